"""Makes a network really smaller: masks, slicing, and the way back from a file.

`shrink` selects the kept positions of every parameter axis and returns a new module; the dense one is left as it was.
`Lineage` says what was kept in terms of the dense network, so a fresh process can `rebuild` the small one.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.structure import attributes as widths
from prune_cli.structure import interpreter
from prune_cli.structure.modules import named_tensors
from prune_cli.structure.plan import Plan


def kept_indices(plan: Plan, keep: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
    """Kept positions per parameter axis; axes that keep everything are left out."""
    present = keep.copy()
    present[0] = True
    found: dict[str, dict[int, np.ndarray]] = {}
    known: dict[int, np.ndarray] = {}  # equal axes share one array
    for name, axes in plan.axes.items():
        for axis, ids in axes.items():
            indices = known.get(id(ids))
            if indices is None:
                indices = known[id(ids)] = present[ids].nonzero()[0]
            if len(indices) < len(ids):
                found.setdefault(name, {})[axis] = indices
    return found


def structured_masks(
    model: nn.Module, plan: Plan, keep: np.ndarray, *, producers_only: bool = False
) -> dict[str, Tensor]:
    """Masks of the parameters that a `keep` array touches (True = keep).

    Zeroes the producers' rows, biases and norm parameters and the consumers' columns, so that the masked network
    computes what the shrunk one does, norms over channels excepted.

    Args:
        model: the network that the plan was made for.
        plan: from `channels.analyse`.
        keep: bool per unit id.
        producers_only: zero the producers' rows and biases alone, through which a channel can grow back.

    Returns:
        Parameter name -> bool tensor that broadcasts to the parameter.
    """
    parameters = dict(model.named_parameters())  # a tensor that layers share once
    only = _rows_and_biases(plan) if producers_only else None
    masks: dict[str, Tensor] = {}
    for name, axes in kept_indices(plan, keep).items():
        if (parameter := parameters.get(name)) is None:
            continue
        if magnitude_of(name) in plan.axes:  # a direction of zero has no length to be divided by
            axes = {axis: kept for axis, kept in axes.items() if axis not in plan.axes[magnitude_of(name)]}
            if not axes:
                continue
        if only is not None and not (axes := {axis: kept for axis, kept in axes.items() if (name, axis) in only}):
            continue
        mask = torch.ones([1] * parameter.dim(), dtype=torch.bool, device=parameter.device)
        for axis, indices in axes.items():
            line = torch.zeros(parameter.shape[axis], dtype=torch.bool)
            line[torch.from_numpy(indices)] = True
            mask = mask & channels_view(line.to(parameter.device), axis, parameter.dim())
        masks[name] = mask
    return masks


def magnitude_of(name: str) -> str:
    """The name of the magnitude that a direction has under weight_norm, "" where a name is none of a direction."""
    other = re.sub(r"weight_v$", "weight_g", re.sub(r"(parametrizations\.weight\.original)1$", r"\g<1>0", name))
    return "" if other == name else other


def _rows_and_biases(plan: Plan) -> set[tuple[str, int]]:
    """(parameter, axis) of the producers and of their own biases; of a weight that is a direction times a magnitude
    (weight_norm) the magnitude, since a direction of zero has none."""
    found = set()
    for family in plan.families:
        others = {name for name, _ in family.others}
        for name, axis in family.producers:
            magnitude = magnitude_of(name)
            found.add((magnitude if magnitude in others else name, axis))
            layer = re.sub(r"(parametrizations\.weight\..*|weight\w*)$", "", name)
            found.update(place for place in family.others if place[0] == f"{layer}bias")
    return found


def channels_view(line: Tensor, axis: int, rank: int) -> Tensor:
    """A vector as a tensor of the given rank that varies along one axis."""
    size = [1] * rank
    size[axis] = len(line)
    return line.reshape(size)


# ---------------------------------------------------------------------------------------------- slicing

PLAIN = frozenset({int, float, bool, str, type(None)})
NO_AXES: Mapping[int, Any] = {}


def copy_with(
    model: nn.Module,
    make: Callable[[Tensor, Mapping[int, Any]], Tensor],
    kept: Mapping[str, Mapping[int, Any]],
) -> nn.Module:
    """A deep copy of the module with new tensors; ties, hooks and everything else are copied as they are."""
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in memo:
            new = make(tensor, kept.get(name, NO_AXES))
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                if type(tensor) is not nn.Parameter and not isinstance(new, type(tensor)):
                    new.__class__ = type(tensor)
            if isinstance(tensor, nn.Parameter):
                _carry_over(tensor, new)
            memo[id(tensor)] = new
    try:
        return _clone(model, memo, {})
    except Exception as error:
        raise SurgeryError(f"the model can't be copied ({error}); remove what copy.deepcopy refuses") from error


def _carry_over(tensor: Tensor, new: Tensor) -> None:
    """Attributes and hooks of a parameter."""
    for key, value in tensor.__dict__.items():
        if not key.startswith("_prune_"):
            setattr(new, key, value)
    if tensor.requires_grad and tensor.is_leaf:
        for hook in (tensor._backward_hooks or {}).values():
            new.register_hook(hook)
        for hook in (getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values():
            new.register_post_accumulate_grad_hook(hook)


def duplicate(model: nn.Module) -> nn.Module:
    """`copy.deepcopy` of a network, also where that refuses computed tensors (old-style weight_norm)."""
    with torch.no_grad():
        return copy_with(model, sliced, {})


def _clone(module: nn.Module, memo: dict[int, Any], ordinary: dict[type, bool]) -> Any:
    """`copy.deepcopy` with a short way for the plain state of ordinary modules."""
    if id(module) in memo:
        return memo[id(module)]
    kind = type(module)
    simple = ordinary.get(kind)
    if simple is None:
        simple = ordinary[kind] = not (
            hasattr(kind, "__deepcopy__") or kind.__reduce_ex__ is not object.__reduce_ex__ or _restores(kind)
        )
    if not simple:
        for part in module.modules():
            for key, value in vars(part).items():
                _detach(value, memo)
                if interpreter.is_cache(key, value):
                    memo[id(value)] = interpreter.emptied(value)
        return copy.deepcopy(module, memo)
    new = kind.__new__(kind)
    memo[id(module)] = new
    state = new.__dict__
    for key, value in module.__dict__.items():
        sort = type(value)
        if sort in PLAIN:
            state[key] = value
        elif (sort is dict or sort is OrderedDict or sort is set) and not value:
            state[key] = sort()
        elif key == "_modules":
            state[key] = {
                name: None if child is None else _clone(child, memo, ordinary) for name, child in value.items()
            }
        elif key == "_parameters" or key == "_buffers":
            state[key] = {name: None if tensor is None else memo[id(tensor)] for name, tensor in value.items()}
        elif sort is tuple and all(type(v) in PLAIN for v in value):
            state[key] = value
        elif key == "_reversed_padding_repeated_twice" and sort is list:
            state[key] = list(value)
        elif interpreter.is_cache(key, value):
            state[key] = interpreter.emptied(value)
        elif key != "_compiled_call_impl":  # as in Module.__getstate__
            _detach(value, memo)
            state[key] = copy.deepcopy(value, memo)
    return new


def _detach(value: Any, memo: dict[int, Any]) -> None:
    """Copies a computed tensor, which deepcopy refuses: the weight that old-style weight_norm leaves behind."""
    if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
        memo[id(value)] = value.detach().clone()


def _restores(kind: type) -> bool:
    """Whether a class rebuilds itself from its state: then deepcopy must do it."""
    ours = all(
        getattr(kind, name).__module__.startswith("torch.nn.modules") for name in ("__getstate__", "__setstate__")
    )
    return issubclass(kind, nn.RNNBase) or not ours


def sliced(tensor: Tensor, axes: Mapping[int, Any]) -> Tensor:
    value = tensor.detach()
    for axis, indices in axes.items():
        here = torch.from_numpy(indices) if isinstance(indices, np.ndarray) else torch.as_tensor(indices)
        value = value.index_select(axis, here if value.is_cpu else here.to(value.device))
    return value if axes else value.clone()


def _hollow(tensor: Tensor, axes: Mapping[int, Any]) -> Tensor:
    if not axes:
        return tensor.detach()
    size = list(tensor.shape)
    for axis, indices in axes.items():
        size[axis] = len(indices)
    return tensor.new_zeros(size)  # fresh zero pages: next to nothing is written


def hollow(model: nn.Module, plan: Plan, keep: np.ndarray) -> nn.Module:
    """The small network without its weights: every changed tensor is zeros."""
    small = copy_with(model, _hollow, kept_indices(plan, keep))
    widths.apply(small, _attributes(model, small, plan, keep))
    return small


def _attributes(model: nn.Module, small: nn.Module, plan: Plan, keep: np.ndarray) -> widths.Edits:
    return widths.edits(model, small, plan.traces, plan.variables, keep, plan.fallbacks.compared)


def same_attributes(model: nn.Module, plan: Plan, other: Plan, keep: np.ndarray) -> bool:
    """Whether two plans of the same channels set the same attributes."""
    small = copy_with(model, _hollow, kept_indices(plan, keep))
    return _attributes(model, small, plan, keep) == _attributes(model, small, other, keep)


def as_tuples(kept: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, dict[int, tuple[int, ...]]]:
    known: dict[int, tuple[int, ...]] = {}
    for axes in kept.values():
        for indices in axes.values():
            if id(indices) not in known:
                known[id(indices)] = tuple(indices.tolist())
    return {name: {axis: known[id(i)] for axis, i in axes.items()} for name, axes in kept.items()}


def cut(
    model: nn.Module, plan: Plan, keep: np.ndarray, kept: Mapping[str, Mapping[int, np.ndarray]]
) -> tuple[nn.Module, widths.Edits]:
    with torch.no_grad():
        small = copy_with(model, sliced, kept)
    found = _attributes(model, small, plan, keep)
    widths.apply(small, found)
    return small, found
