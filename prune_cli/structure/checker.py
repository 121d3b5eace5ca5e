"""Executes the small network beside the trace of the dense one and refuses the operators that did not follow.

After an operator that did not follow, the run goes on with zeros of the shape that was expected: one run finds them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.errors import first_line
from prune_cli.structure import attention, interpreter
from prune_cli.structure.interpreter import FREE, LOCAL, Modules, Refused, Tracer, numbers_of, scalar_of
from prune_cli.structure.labels import NOTHING, Kind, Labelling, beside_labels, varied
from prune_cli.structure.looks import replayed
from prune_cli.structure.modules import walk
from prune_cli.structure.operators.movement import padded
from prune_cli.structure.plan import Plan
from prune_cli.structure.trace import Step, Trace

RESHAPES = {"view", "_unsafe_view"}
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
MANY = 1000  # refusals of one run, after which it ends


class Checker(Tracer):
    """Executes the small network and compares every step with the dense one."""

    def __init__(self, modules: Modules, trace: Trace, keep: Tensor, *, training: bool, unscaled: bool = False):
        super().__init__(modules)
        self.training, self.unscaled = training, unscaled
        self.trace, self.keep = trace, keep  # keep[variable + 1], ANY first
        self.sizes: dict[int, tuple[int, ...] | None] = {}  # by identity of a label, which the trace keeps alive
        self.scales: dict[str, float] = {}  # layer -> change of the numbers that it multiplies by
        self.refusals: list[Refused] = []
        self.constants: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []  # of another size: step, old, new shape

    def patches(self) -> ExitStack:
        replaced = super().patches()
        replayed(self, self.trace, replaced)
        for name in DROPOUTS if self.training and not self.trace.training else ():
            replaced.enter_context(patch.object(nn.functional, name, lambda tensor, *args, **kwargs: tensor))
        return replaced

    def known(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], looks: bool) -> Any:
        """What the dense network found here, where it looks at values."""
        if self.trace.values is None or self.ordinal not in self.trace.values:
            return None
        value, step = self.trace.values[self.ordinal], self.trace.steps[self.ordinal]
        if not isinstance(value, list) or step.name != name:
            return None if isinstance(value, list) else value
        return self._made(step, func, args, value)

    def _made(self, step: Step, func: Any, args: tuple[Any, ...], values: Sequence[Tensor | None] = ()) -> Any:
        """Outputs of an operator without running it: what is known of them, and zeros of the shapes that are expected;
        None where that is not known."""
        given = next((a for a in args if isinstance(a, Tensor)), None)
        device = given.device if given is not None else None
        made: list[Tensor] = []
        for (shape, labelling), dtype, value in zip(
            step.outs, step.dtypes, values or [None] * len(step.outs), strict=True
        ):
            expected = self.shape(shape, labelling)
            if value is None and (expected is None or FREE in expected):
                return None
            tensor = (
                torch.zeros(expected or (), dtype=dtype, device=device) if value is None else value.to(device).clone()
            )
            tensor._prune_hollow = value is None and dtype.is_floating_point  # type: ignore[attr-defined]
            made.append(tensor)
        if func._schema.is_mutable:
            if len(made) != 1 or given is None or given.shape != made[0].shape:
                return None
            return given if not values else given.copy_(made[0])
        returns = func._schema.returns
        if len(returns) == 1:
            return made if "Tensor[]" in str(returns[0].type) or str(returns[0].type).startswith("List") else made[0]
        return tuple(made) if len(returns) == len(made) else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except Refused as refused:
            error = refused
        except Exception as raised:  # what torch says about shapes
            error = self._refused(f"{type(raised).__name__}: {first_line(raised)}"[:200])
        step = self.trace.steps[self.ordinal] if self.ordinal < len(self.trace.steps) else None
        if step is None or {step.name, self.name} not in ({step.name}, RESHAPES) or len(self.refusals) >= MANY:
            raise error
        instead = self._made(step, func, args)
        if instead is None:
            raise error
        self.refusals.append(error)
        self.running = self.busy = False
        return instead

    @property
    def name(self) -> str:
        """The operator that runs, in-place relatives without underscore."""
        return self.current[:-1] if self.current.endswith("_") else self.current

    def _refused(self, why: str) -> Refused:
        return Refused(min(self.ordinal, len(self.trace.steps) - 1), self.layer, self.name, why)

    def failed(self, why: str) -> Exception:
        """An error between two operators: the next one is where the width is spelt out."""
        ordinal = min(self.ordinal + (not self.running), len(self.trace.steps) - 1)
        return Refused(ordinal, self.layer, self.current, why)

    def visit(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        step = self._step(name)
        if step is None:  # a copy for a reshape that the dense network does without
            self.ordinal -= 1
            return
        if step.name != name and {step.name, name} != RESHAPES:
            raise Refused(self.ordinal, self.layer, name, f"the dense network runs {step.name} here")
        if step.scalar is not None and (now := scalar_of(name, args)) and now != step.scalar:
            scales = attention.known if self.unscaled else attention.scales_queries
            if name not in ("mul", "div") or not scales(self.stack[-1][1]):
                raise Refused(self.ordinal, self.layer, name, f"its number was {step.scalar:.6g} and became {now:.6g}")
            self.scales[self.layer] = self.scales.get(self.layer, 1.0) * now / step.scalar
        if step.numbers:
            numbers = numbers_of(name, args, kwargs)
            if name == "native_group_norm" and step.numbers[0] == args[6]:  # one channel may be left in every group
                numbers = step.numbers[:1] + numbers[1:]
            if numbers != step.numbers and repr(numbers) != repr(step.numbers):  # nan is not equal to itself
                raise Refused(self.ordinal, self.layer, name, f"its numbers were {step.numbers} and became {numbers}")
        outs = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        for tensor, (shape, labelling) in zip(outs, step.outs, strict=True):
            if labelling.kind is Kind.UNIFORM and not labelling.labels:
                if tuple(tensor.shape) != shape and FREE not in shape:
                    self.constants.append((self.ordinal, shape, tuple(tensor.shape)))
                continue
            expected = self.shape(shape, labelling)
            if expected is None or not _fits(tensor.shape, expected):
                raise Refused(self.ordinal, self.layer, name, f"shape {tuple(tensor.shape)}, expected {expected}")
        if step.source is not None and name in LOCAL:
            self._positions(step, args, kwargs, outs)

    def _step(self, name: str) -> Step | None:
        """The dense network's step for an operator; None for a copy that only the small network needs.

        Whether a reshape copies depends on strides, so on sizes: with one head left it does not.
        """
        if self.ordinal >= len(self.trace.steps):
            raise Refused(len(self.trace.steps) - 1, self.layer, name, "it runs more operators than the dense network")
        step = self.trace.steps[self.ordinal]
        if name == step.name or "clone" not in (name, step.name):
            return step
        if name == "clone":
            return None
        self.ordinal += 1
        return self.trace.steps[min(self.ordinal, len(self.trace.steps) - 1)]

    def returned_constants(self, outputs: Sequence[Tensor]) -> None:
        """Refuses where a constant that the model returns has another size: a size of channels that no label follows."""
        for want, tensor in zip(self.trace.outputs, outputs, strict=False):
            now = tuple(tensor.shape)
            made = next((at for at, old, new in reversed(self.constants) if (old, new) == (want, now)), None)
            if made is None or len(want) != len(now):
                continue
            sizes = {(a, b) for a, b in zip(want, now, strict=True) if a != b}
            for ordinal in range(made, -1, -1):  # the channels that were counted last
                step = self.trace.steps[ordinal]
                if any(self._lost(shape, labelling) & sizes for shape, labelling in step.outs):
                    self.refusals.append(
                        Refused(ordinal, step.layer, step.name, f"the model returns {now}, not {want}")
                    )
                    break

    def _lost(self, shape: tuple[int, ...], labelling: Labelling) -> set[tuple[int, int]]:
        return set(zip(shape, self.shape(shape, labelling) or shape, strict=True))

    def shape(self, shape: tuple[int, ...], labelling: Labelling) -> tuple[int, ...] | None:
        """The shape of a tensor after removal, None where what is kept is not a product."""
        size = list(shape)
        for label in labelling.labels:
            axes = varied(label)
            if axes:
                kept = self._kept(label, axes)
                if kept is None:
                    return None
                for axis, n in zip(axes, kept, strict=True):
                    size[axis] = min(size[axis], n) if size[axis] != shape[axis] else n
        return tuple(size)

    def _kept(self, label: Tensor, axes: tuple[int, ...]) -> tuple[int, ...] | None:
        if id(label) not in self.sizes:
            self.sizes[id(label)] = self._count(label, axes)
        return self.sizes[id(label)]

    def _count(self, label: Tensor, axes: tuple[int, ...]) -> tuple[int, ...] | None:
        mask = self.keep[_dense(label, axes) + 1]
        if len(axes) == 1:
            return (int(np.count_nonzero(mask.numpy())),)
        sizes = []
        for axis in range(len(axes)):
            others = [a for a in range(len(axes)) if a != axis]
            sizes.append(int(mask.amax(others).sum()))
        total = 1
        for n in sizes:
            total *= n
        return tuple(sizes) if int(mask.sum()) == total else None

    def _positions(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any], outs: list[Tensor]) -> None:
        """Slices and the like: the same operator picks the same positions of the kept labels."""
        _, labelling = step.source or ((), NOTHING)
        for number, label in enumerate(labelling.labels):
            small = self._small(label, args[0].shape)
            if small is None:
                raise Refused(self.ordinal, self.layer, step.name, "what is kept is not a product")
            if any(len(m.labels) != len(labelling.labels) for _, m in step.outs):
                continue
            if any(len(varied(m.labels[number])) < len(varied(label)) for _, m in step.outs):
                continue  # all positions along the axis live or die together
            if step.name == "constant_pad_nd":
                got = _padded(small, label, args[1]).expand(outs[0].shape)
            else:
                got = step.func(small.contiguous(), *beside_labels(args[1:]), **kwargs)
            for have, tensor, (_, out) in zip(
                got if isinstance(got, (tuple, list)) else (got,), outs, step.outs, strict=True
            ):
                want = self._small(out.labels[number], tensor.shape)
                if want is not None and step.name == "constant_pad_nd":  # new positions have variables of their own
                    want = torch.where(torch.isin(want.contiguous(), small.contiguous()), want, -1)
                if want is None or not torch.equal(
                    torch.where(want <= 0, want.new_tensor(-1), want),
                    torch.where(have <= 0, have.new_tensor(-1), have),
                ):
                    raise Refused(self.ordinal, self.layer, step.name, "it takes other positions")

    def _small(self, label: Tensor, shape: torch.Size) -> Tensor | None:
        axes = varied(label)
        dense = _dense(label, axes)
        kept = dense[self.keep[dense + 1]]
        target = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
        if kept.numel() != torch.Size(target).numel():
            return None
        return kept.reshape(target).expand(shape)


def _fits(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all(b in (a, FREE) for a, b in zip(shape, expected, strict=True))


def _padded(small: Tensor, label: Tensor, pads: Sequence[int]) -> Tensor:
    """Pads the axes that carry labels; along the others a channel stays itself."""
    axes, rank = varied(label), label.dim()
    cut = [n if rank - 1 - i // 2 in axes else 0 for i, n in enumerate(pads)]
    narrow = small[tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(rank))]
    return padded(narrow, cut, -1)


def _dense(label: Tensor, axes: Sequence[int]) -> Tensor:
    return label.as_strided([label.shape[a] for a in axes], [label.stride(a) for a in axes], label.storage_offset())


def examine(
    small: nn.Module, plan: Plan, keep: np.ndarray, *, training: bool = False
) -> tuple[list[Refused], dict[str, float]]:
    """Executes the small network beside the traces of the dense one.

    Args:
        small: the small network; values of its weights do not matter.
        plan: of the dense one.
        keep: bool per unit id.
        training: executes it in training mode, dropout left out, also beside a trace in evaluation: where that agrees,
            training runs the same operators.

    Returns:
        The operators that did not follow the new widths, in the order of traces and operators, and per attention layer the
        change of the numbers that it multiplies by (a scale derived from its width).
    """
    present = keep.copy()
    present[0] = True
    of_variable = torch.from_numpy(np.concatenate([[True], present[plan.variables]]))
    modules = walk(small)
    scales: dict[str, float] = {}
    refusals: list[Refused] = []
    for number, dense in enumerate(plan.traces):
        trains, unscaled = training or dense.training, plan.fallbacks.unscaled
        checker = Checker(modules, dense, of_variable, training=trains, unscaled=unscaled)
        try:
            checker.returned_constants(interpreter.execute(small, plan.example, checker, checker.training))
        except Refused as error:
            checker.refusals.append(error)
        for refusal in checker.refusals:
            refusal.trace = number
        refusals += checker.refusals
        scales = checker.scales | scales
    return refusals, scales
