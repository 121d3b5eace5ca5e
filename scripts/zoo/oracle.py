"""What a small network must compute, found without the project's engine.

A copy of the dense network has zeros where `Lineage.kept` leaves something out, and is executed plainly. One thing is
not plain: norms and softmaxes over channels, and means in them, see those zeros. There the positions that are exactly
zero everywhere *and* are, in their axis, exactly what some `kept` leaves out, are cut out before and put back after.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kept = Mapping[str, Mapping[int, tuple[int, ...]]]
DIRECTIONS = {"weight_v": "weight_g", "parametrizations.weight.original1": "parametrizations.weight.original0"}


def masked(dense: nn.Module, kept: Kept) -> nn.Module:
    """A copy of the dense network with zeros where something was left out."""
    twin = copy.deepcopy(dense)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, axes in kept.items():
            if name not in parameters:
                continue
            for axis, indices in axes.items():
                gone = sorted(set(range(parameters[name].shape[axis])) - set(indices))
                if not _by_magnitude(name, axis, kept, parameters):
                    parameters[name].index_fill_(axis, torch.tensor(gone), 0)
    for name, module in twin.named_modules():
        own = list(module.parameters(recurse=False))
        full = f"{name}.weight" if name else "weight"
        vectors = (
            own
            and all(p.dim() == 1 and p.shape == own[0].shape for p in own)
            and len(own) == len(list(module.parameters()))
        )
        if vectors and 0 in kept.get(full, {}) and not type(module).__module__.startswith("torch."):
            _narrow(module, torch.tensor(kept[full][0]), len(own[0]))
    return twin


def _narrow(module: nn.Module, kept: Tensor, size: int) -> None:
    """Lets a module of one vector per channel (a norm of a library's own) see the channels that are left, alone."""
    small, plain = copy.deepcopy(module), module.forward
    for key, parameter in list(small._parameters.items()):
        if parameter is not None:
            small._parameters[key] = nn.Parameter(parameter.detach()[kept])
    for key, value in vars(small).items():
        if value == (size,):
            setattr(small, key, (len(kept),))

    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Tensor) or size not in x.shape or args or kwargs:
            return plain(x, *args, **kwargs)
        axis = 1 if x.dim() == 4 and x.shape[1] == size and x.shape[-1] != size else x.dim() - 1
        if x.shape[axis] != size:
            return plain(x)
        out = small(x.index_select(axis, kept))
        return out.new_zeros(x.shape).index_copy_(axis, kept, out)

    module.forward = forward  # type: ignore[method-assign]


def _by_magnitude(name: str, axis: int, kept: Kept, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a zero magnitude says it already: a direction of zero has none (weight_norm)."""
    for direction, magnitude in DIRECTIONS.items():
        if name.endswith(direction):
            other = name.removesuffix(direction) + magnitude
            return axis in kept.get(other, {})
    return False


@contextmanager
def composed() -> Iterator[None]:
    """Layers of attention as plain operators, whose norms can be seen, and `torch.cond` as an `if`."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    branch = lambda condition, true, false, operands=(): true(*operands) if condition else false(*operands)  # noqa: E731
    try:
        with patch.object(torch, "cond", branch):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class CutNorms(TorchDispatchMode):
    """Executes a masked network with norms, softmaxes and means over the channels that are left."""

    def __init__(self, dense: nn.Module, twin: nn.Module, kept: Kept) -> None:
        super().__init__()
        self.affine = {
            id(parameter): torch.tensor(kept[name][0])
            for name, parameter in twin.named_parameters(remove_duplicate=False)
            if parameter.dim() == 1 and 0 in kept.get(name, {})
        }
        shapes = {name: tensor.shape for name, tensor in dense.named_parameters(remove_duplicate=False)}
        shapes |= {name: tensor.shape for name, tensor in dense.named_buffers(remove_duplicate=False)}
        self.gone: dict[int, set[frozenset[int]]] = {}
        self.means: dict[int, tuple[Tensor, int, Tensor]] = {}  # by identity: of what is left along an axis
        for name, axes in kept.items():
            for axis, indices in axes.items():
                size = shapes[name][axis]
                self._note(size, frozenset(range(size)) - frozenset(indices))

    def _note(self, size: int, gone: frozenset[int]) -> None:
        """Also of the parts of the axis that a view makes: what is gone in every part, and parts gone whole."""
        if gone in self.gone.setdefault(size, set()):
            return
        self.gone[size].add(gone)
        for parts in range(2, size):
            if size % parts == 0:
                width = size // parts
                each = [
                    frozenset(i - p * width for i in gone if p * width <= i < (p + 1) * width) for p in range(parts)
                ]
                for found in (frozenset.intersection(*each), *each):
                    if found and len(found) < width:
                        self.gone.setdefault(width, set()).add(found)
                whole = frozenset(p for p, one in enumerate(each) if len(one) == width)
                if whole:
                    self.gone.setdefault(parts, set()).add(whole)

    def _alive(self, tensor: Tensor, axis: int, weight: Tensor | None = None) -> Tensor | None:
        """The positions that are left, by the norm's own weight where it has one, None where that is all of them."""
        axis %= tensor.dim()
        if weight is not None:
            return self.affine.get(id(weight))
        candidates = self.gone.get(tensor.shape[axis])
        if not candidates or not tensor.is_floating_point():
            return None
        zero = (tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1) == 0).all(1)
        dead = frozenset(zero.nonzero().flatten().tolist())
        if not dead or len(dead) == len(zero):
            return None
        if dead not in candidates:
            found = [one for one in candidates if one <= dead]
            dead = max(found, key=len, default=frozenset())
        return torch.tensor([i for i in range(len(zero)) if i not in dead]) if dead else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handle = getattr(self, "do_" + func._schema.name[6:].rstrip("_"), None)
        done = handle(func, args, kwargs) if handle is not None and not func._schema.is_mutable else None
        return func(*args, **kwargs) if done is None else done

    def do_native_layer_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, shape = args[:2]
        first = source.dim() - len(shape)
        affine = [*args[2:4]]
        for axis in range(first, source.dim()):
            own = affine[0] if len(shape) == 1 else None
            if (alive := self._alive(source, axis, own)) is not None:
                cut = [None if a is None else a.index_select(axis - first, alive) for a in affine]
                narrow = source.index_select(axis, alive)
                small = func(narrow, list(narrow.shape[first:]), *cut, *args[4:], **kwargs)
                return (torch.zeros_like(source).index_copy_(axis, alive, small[0]), *small[1:])
        return None

    def do__fused_rms_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, shape = args[:2]
        if len(shape) != 1 or (alive := self._alive(source, -1, args[2])) is None:
            return None
        weight = None if args[2] is None else args[2].index_select(0, alive)
        small = func(source.index_select(-1, alive), [len(alive)], weight, *args[3:], **kwargs)
        return (torch.zeros_like(source).index_copy_(source.dim() - 1, alive, small[0]), *small[1:])

    def do_native_group_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, weight, bias, batch, channels, area, groups, eps = args
        alive = None if groups == channels else self._alive(source, 1, weight)
        if alive is None or len(alive) % groups:
            return None
        cut = [None if a is None else a.index_select(0, alive) for a in (weight, bias)]
        small = func(source.index_select(1, alive).contiguous(), *cut, batch, len(alive), area, groups, eps)
        return (torch.zeros_like(source).index_copy_(1, alive, small[0]), *small[1:])

    def do_native_batch_norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Of a weight (1, out, in * kernel), which is standardised so: over the inputs that are left."""
        source = args[0]
        if not (args[5] and source.dim() == 3 and len(source) == 1) or (source == 0).all():
            return None
        rows = source[0][(source[0] != 0).any(1)]
        alive = (rows != 0).any(0).nonzero().flatten()
        if len(alive) == source.shape[2]:
            return None
        small = func(source.index_select(2, alive), *args[1:], **kwargs)
        return (torch.zeros_like(source).index_copy_(2, alive, small[0]), *small[1:])

    def do__softmax(self, func: Any, args: Any, kwargs: Any) -> Any:
        alive = self._alive(args[0], args[1])
        if alive is None:
            return None
        axis = args[1] % args[0].dim()
        small = func(args[0].index_select(axis, alive), *args[1:], **kwargs)
        return torch.zeros_like(args[0]).index_copy_(axis, alive, small)

    do__safe_softmax = do__softmax

    def _reduced(self, func: Any, args: Any, kwargs: Any) -> Any:
        source = args[0]
        axes = args[1] if len(args) > 1 else kwargs.get("dim")
        if axes is None or axes == []:
            axes = list(range(source.dim()))
        axes = [axes] if isinstance(axes, int) else axes
        rank, left = source.dim(), None
        for axis in axes:
            if (alive := self._alive(source, axis)) is not None:
                source, left = source.index_select(axis, alive), (axis % rank, alive)
        if left is None:
            return None
        found = func(source, *args[1:], **kwargs)
        for one in found if isinstance(found, tuple) else (found,):
            if one.dim() == rank:
                self.means[id(one)] = (one, *left)
        return found

    def do_sub(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A difference from the mean of what is left is centred there, and 0 elsewhere still."""
        if not isinstance(args[1], Tensor) or id(args[1]) not in self.means:
            return None
        _, axis, alive = self.means[id(args[1])]
        if not isinstance(args[0], Tensor) or args[0].dim() <= axis or args[0].shape[axis] <= int(alive.max()):
            return None
        return torch.zeros_like(args[0]).index_copy_(
            axis, alive, func(args[0].index_select(axis, alive), *args[1:], **kwargs)
        )

    do_mean = do_var = do_var_mean = do_std = do_std_mean = _reduced


def outputs(found: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output."""
    if not isinstance(found, (Tensor, tuple, list, dict)):
        if hasattr(found, "items"):
            found = dict(found.items())
        elif hasattr(found, "__dict__"):
            found = list(vars(found).values())
    leaves = [outputs(one) if hasattr(one, "items") or (hasattr(one, "__dict__") and not isinstance(one, Tensor)) else [one]
              for one in tree_leaves(found)]  # fmt: skip
    return [t for one in leaves for t in one if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]


def difference(want: Iterable[Tensor], got: Iterable[Tensor]) -> float:
    """Largest difference relative to the largest output; infinite where shapes or what is finite differ."""
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        ok = a.isfinite()
        if ok.any():
            scale = float(a[ok].abs().max()) or 1.0
            worst = max(worst, float((a[ok] - b[ok]).abs().max()) / scale)
    return worst
