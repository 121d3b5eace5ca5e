"""The masked dense network as a reference: what the shrunk one must compute.

Masks zero channels, which is exact for every operator but one kind: a norm over channels (LayerNorm, GroupNorm,
RMSNorm) counts the zeros. Here those operators see only the channels that are kept. Where a weight is divided by its own
length (weight_norm) a masked row would be 0 / 0: there the magnitude alone is masked, or what is no number is set to zero
in what is removed.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.structure import interpreter as tracing
from prune_cli.structure.interpreter import Example, Modules, Tracer
from prune_cli.structure.labels import NOTHING, Kind, flat, varied
from prune_cli.structure.lineage import Shrunk
from prune_cli.structure.modules import walk
from prune_cli.structure.plan import Plan
from prune_cli.structure.slicing import channels_view, duplicate, kept_indices, magnitude_of
from prune_cli.structure.trace import Step, Trace

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output: rounding in float32 stays far below."""


class KeptNorms(Tracer):
    """Executes a masked network with norms over the kept channels.

    Args:
        modules: of the masked network, from `walk`.
        trace: of the dense one.
        keep: by variable + 1.
        device: where the network is.
        defined: whether what is no number in removed positions counts as the zero that it stands for.
    """

    real = True

    def __init__(
        self, modules: Modules, trace: Trace, keep: np.ndarray, device: torch.device, *, defined: bool = False
    ) -> None:
        super().__init__(modules)
        self.keep, self.device, self.defined = keep, device, defined
        self.steps: dict[tuple[str, str, int], Step] = {}  # layer, operator, how many times before
        self.seen: Counter[tuple[str, str]] = Counter()
        for step in trace.steps:
            if defined or step.name in tracing.NORM_OPERATORS:
                self.steps[step.layer, step.name, self.seen[step.layer, step.name]] = step
                self.seen[step.layer, step.name] += 1
        self.seen.clear()
        self.step: Step | None = None  # of the operator that runs

    def visit(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Sets what is no number to zero where it is removed."""
        if not self.defined or self.step is None:
            return
        made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        for tensor, (_, labelling) in zip(made, self.step.outs, strict=False):
            for label in labelling.labels if tensor.is_floating_point() and bool(tensor.isnan().any()) else ():
                for axis in varied(label)[:1] if len(varied(label)) == 1 else ():
                    gone = torch.from_numpy(~self.keep[flat(label) + 1]).to(self.device)
                    if len(gone) == tensor.shape[axis]:
                        tensor.masked_fill_(channels_view(gone, axis, tensor.dim()), 0.0)

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes an operator; norms over the kept positions."""
        if name not in tracing.NORM_OPERATORS and not self.defined:
            return super().run(name, func, args, kwargs)
        step = self.step = self.steps.get((self.layer, name, self.seen[self.layer, name]))
        self.seen[self.layer, name] += 1
        if name not in tracing.NORM_OPERATORS or step is None or step.source is None or not step.source[1].labels:
            return super().run(name, func, args, kwargs)
        label = max(
            step.source[1].labels,
            key=lambda f: max(varied(f), default=-1) if "layer" in name else 1 in varied(f),
        )
        if "softmax" in name:
            return self._softmax(func, args, kwargs, step)
        if name == "native_group_norm":
            return self._group_norm(func, args, label)
        if name in ("native_layer_norm", "_fused_rms_norm"):
            return self._layer_norm(func, args, label)
        if name == "native_batch_norm":
            return self._batch_norm(func, args, step)
        if step.norm:
            source, dims = args[0], self._dims(args, args[0].dim())
            for field in step.source[1].labels:
                if len(varied(field)) == 1 and varied(field)[0] in dims:
                    _fits(field, args[0], varied(field)[0])
                    source = source.index_select(varied(field)[0], self._kept(field))
            return func(source, *args[1:], **kwargs)
        return super().run(name, func, args, kwargs)

    def _batch_norm(self, func: Any, args: tuple[Any, ...], step: Step) -> Any:
        """Of a weight (1, out, in * kernel), which is standardised so; what it makes of activations is exact."""
        labelling = step.source[1] if step.source else NOTHING
        for label in labelling.labels:
            if labelling.kind is Kind.WEIGHT and varied(label) == (2,):
                kept = self._kept(label)
                small = func(args[0].index_select(2, kept), *args[1:])
                return (torch.zeros_like(args[0]).index_copy_(2, kept, small[0]), *small[1:])
        return func(*args)

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step) -> Any:
        axis = args[1] % args[0].dim()
        for label in step.source[1].labels if step.source else ():
            if varied(label) == (axis,):
                _fits(label, args[0], axis)
                kept = self._kept(label)
                out = torch.zeros_like(args[0])
                return out.index_copy_(axis, kept, func(args[0].index_select(axis, kept), *args[1:], **kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _dims(args: tuple[Any, ...], rank: int) -> set[int]:
        dims = args[1] if len(args) > 1 else None
        return {d % rank for d in dims} if isinstance(dims, (list, tuple)) and dims else set(range(rank))

    def _kept(self, label: Tensor) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self.keep[flat(label) + 1])).to(self.device)

    def _layer_norm(self, func: Any, args: tuple[Any, ...], label: Tensor) -> Any:
        source, first = args[0], args[0].dim() - len(args[1])
        if len(varied(label)) != 1 or varied(label)[0] < first:
            return func(*args)
        kept, axis = self._kept(label), varied(label)[0]
        _fits(label, source, axis)
        affine = [a.index_select(axis - first, kept) if isinstance(a, Tensor) else a for a in args[2:]]
        narrow = source.index_select(axis, kept)
        small = func(narrow, list(narrow.shape[first:]), *affine)
        results = small if isinstance(small, tuple) else (small,)
        out = torch.zeros_like(source).index_copy_(axis, kept, results[0])
        return (out, *results[1:]) if isinstance(small, tuple) else out

    def _group_norm(self, func: Any, args: tuple[Any, ...], label: Tensor) -> Any:
        source, weight, bias, batch, _, area, groups, eps = args
        if varied(label) != (1,):
            return func(*args)
        _fits(label, source, 1)
        kept = self._kept(label)
        if groups == source.shape[1]:
            return func(*args)
        affine = [a if a is None else a[kept] for a in (weight, bias)]
        small = func(source[:, kept].contiguous(), *affine, batch, len(kept), area, groups, eps)
        out = torch.zeros_like(source)
        out[:, kept] = small[0]
        return (out, *small[1:])


def _fits(label: Tensor, source: Tensor, axis: int) -> None:
    """Inputs of another shape than the example's may run other code, which this reference cannot follow."""
    if source.dim() != label.dim() or source.shape[axis] != label.shape[axis]:
        raise ValueError("a norm over channels that the example did not show")


def forward(model: nn.Module, plan: Plan, keep: np.ndarray, example: Example) -> list[Tensor]:
    """Outputs of the dense network with masks applied and norms over the kept channels.

    Args:
        model: the dense network; left as it was.
        plan: its plan.
        keep: bool per unit id.
        example: inputs like the plan's example, perhaps of another batch size.

    Raises:
        SurgeryError: the network does not run on them.
    """
    present = keep.copy()
    present[0] = True
    of_variable = np.concatenate([[True], present[plan.variables]])
    masked = duplicate(model)
    named = dict(masked.named_parameters())
    with torch.no_grad():
        for name, axes in kept_indices(plan, keep).items():
            lengths = plan.axes.get(magnitude_of(name), {})
            for axis, indices in axes.items() if name in named else ():
                if axis not in lengths:
                    gone = np.delete(np.arange(named[name].shape[axis]), indices)
                    named[name].index_fill_(axis, torch.from_numpy(gone).to(named[name].device), 0)
    device = next((parameter.device for parameter in masked.parameters()), torch.device("cpu"))

    def run(defined: bool) -> list[Tensor]:
        tracer = KeptNorms(walk(masked), plan.traces[0], of_variable, device, defined=defined)
        return tracing.execute(masked, example, tracer, training=False)

    outputs = run(False)
    return run(True) if any(t.is_floating_point() and bool(t.isnan().any()) for t in outputs) else outputs


class Small(Tracer):
    """Executes the shrunk network as it is."""

    real = True

    def failed(self, why: str) -> Exception:
        return SurgeryError(f"the shrunk network does not run ({why})")


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Outputs of a shrunk network, with the operators that `forward` uses for the dense one.

    Raises:
        SurgeryError: it does not run.
    """
    return tracing.execute(model, example, Small(walk(model)), training=False)


def gap(want: list[Tensor], got: list[Tensor]) -> float:
    """Largest absolute difference relative to the largest finite output; infinite where one is no number or the shapes
    differ. Equal infinities are equal."""
    if [t.shape for t in want] != [t.shape for t in got]:
        return math.inf
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if (a.is_floating_point() or a.is_complex()) and a.numel():
            finite = a[torch.isfinite(a)].abs()
            scale = (float(finite.max()) if finite.numel() else 0.0) or 1.0
            largest = float(torch.where(a == b, 0.0, (a - b).abs()).max()) / scale
            if not largest <= worst:  # also where it is no number
                worst = largest
            if math.isnan(worst):
                return math.inf
    return worst


def difference(model: nn.Module, shrunk: Shrunk, example: Example) -> float:
    """The `gap` between the shrunk and the masked network.

    Args:
        model: the dense network, both in evaluation.
        shrunk: from `surgery.remove_units`.
        example: inputs like the plan's example.

    Raises:
        SurgeryError: one of them does not run.
    """
    return gap(forward(model, shrunk.plan, shrunk.keep, example), outputs(shrunk.model, example))
