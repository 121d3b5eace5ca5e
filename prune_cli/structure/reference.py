"""The masked dense network as a reference: what the shrunk one must compute.

Masks zero channels, which is exact for every operator but one kind: a norm over channels (LayerNorm, GroupNorm,
RMSNorm) counts the zeros. Here those operators see only the channels that are kept.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.structure import interpreter as tracing
from prune_cli.structure.interpreter import Example, Modules, Step, Trace, Tracer
from prune_cli.structure.labels import NOTHING, Kind, flat, varied
from prune_cli.structure.modules import walk
from prune_cli.structure.plan import Plan
from prune_cli.structure.slicing import duplicate, kept_indices
from prune_cli.structure.surgery import Shrunk


class KeptNorms(Tracer):
    """Executes a masked network with norms over the kept channels."""

    real = True

    def __init__(self, modules: Modules, trace: Trace, keep: np.ndarray, device: torch.device) -> None:
        super().__init__(modules)
        self.keep, self.device = keep, device  # keep[variable + 1]
        self.steps: dict[tuple[str, str, int], Step] = {}  # layer, operator, how many times before
        self.seen: Counter[tuple[str, str]] = Counter()
        for step in trace.steps:
            if step.name in tracing.NORM_OPERATORS:
                self.steps[step.layer, step.name, self.seen[step.layer, step.name]] = step
                self.seen[step.layer, step.name] += 1
        self.seen.clear()

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes an operator; norms over the kept positions."""
        if name not in tracing.NORM_OPERATORS:
            return super().run(name, func, args, kwargs)
        step = self.steps.get((self.layer, name, self.seen[self.layer, name]))
        self.seen[self.layer, name] += 1
        if step is None or step.source is None or not step.source[1].fields:
            return super().run(name, func, args, kwargs)
        label = max(
            step.source[1].fields,
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
            for field in step.source[1].fields:
                if len(varied(field)) == 1 and varied(field)[0] in dims:
                    source = source.index_select(varied(field)[0], self._kept(field))
            return func(source, *args[1:], **kwargs)
        return super().run(name, func, args, kwargs)

    def _batch_norm(self, func: Any, args: tuple[Any, ...], step: Step) -> Any:
        """Of a weight (1, out, in * kernel), which is standardised so; what it makes of activations is exact."""
        marks = step.source[1] if step.source else NOTHING
        for label in marks.fields:
            if marks.kind is Kind.WEIGHT and varied(label) == (2,):
                kept = self._kept(label)
                small = func(args[0].index_select(2, kept), *args[1:])
                return (torch.zeros_like(args[0]).index_copy_(2, kept, small[0]), *small[1:])
        return func(*args)

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step) -> Any:
        axis = args[1] % args[0].dim()
        for label in step.source[1].fields if step.source else ():
            if varied(label) == (axis,):
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
        kept = self._kept(label)
        if groups == source.shape[1]:
            return func(*args)
        affine = [a if a is None else a[kept] for a in (weight, bias)]
        small = func(source[:, kept].contiguous(), *affine, batch, len(kept), area, groups, eps)
        out = torch.zeros_like(source)
        out[:, kept] = small[0]
        return (out, *small[1:])


def forward(model: nn.Module, plan: Plan, keep: np.ndarray, example: Example) -> list[Tensor]:
    """Outputs of the dense network with masks applied and norms over the kept channels.

    Args:
        model: the dense network; left as it was.
        plan: its plan.
        keep: bool per unit id.
        example: inputs of the same shapes as the plan's example.
    """
    present = keep.copy()
    present[0] = True
    of_variable = np.concatenate([[True], present[plan.variables]])
    masked = duplicate(model)
    named = dict(masked.named_parameters())
    with torch.no_grad():
        for name, axes in kept_indices(plan, keep).items():
            for axis, indices in axes.items() if name in named else ():
                gone = np.delete(np.arange(named[name].shape[axis]), indices)
                named[name].index_fill_(axis, torch.from_numpy(gone).to(named[name].device), 0)
    device = next((parameter.device for parameter in masked.parameters()), torch.device("cpu"))
    tracer = KeptNorms(walk(masked), plan.traces[0], of_variable, device)
    return tracing.execute(masked, example, tracer, training=False)


def difference(model: nn.Module, shrunk: Shrunk, example: Example) -> float:
    """Largest absolute difference of the outputs of the shrunk and the masked network, relative to the largest output.

    Args:
        model: the dense network, both in evaluation.
        shrunk: from `surgery.remove_units`.
        example: inputs of the same shapes as the plan's example.
    """
    want = forward(model, shrunk.plan, shrunk.keep, example)

    class Plain(Tracer):
        real = True

    got = tracing.execute(shrunk.model, example, Plain(walk(shrunk.model)), training=False)
    worst = 0.0
    for a, b in zip(want, got, strict=True):
        if a.is_floating_point() and a.numel():
            scale = float(a.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst
