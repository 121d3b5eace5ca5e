"""Executes the dense network on labels: every operator's rule is asked what its output carries."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from prune_cli.structure.attention import TIED_ATTENTION, code_of, has_heads, query_projection
from prune_cli.structure.interpreter import (
    FREE,
    FROZEN_LEVEL,
    LOCAL,
    NORM_OPERATORS,
    BrokenRule,
    Cut,
    Fallbacks,
    Modules,
    Step,
    Trace,
    Tracer,
    scalar_of,
)
from prune_cli.structure.labels import NOTHING, Constraints, Kind, Marks, marks_of, varied, vector
from prune_cli.structure.modules import named_tensors, widths_of
from prune_cli.structure.operators.call import Call, Result, Unsupported, positive_axis, tensors
from prune_cli.structure.operators.mixing import per_channel, pointwise
from prune_cli.structure.operators.table import factory, frozen, rule

log = logging.getLogger(__name__)
STRICT = "PRUNE_STRICT_RULES"

Parameters = dict[str, tuple[Tensor, dict[int, int]]]  # name -> tensor and, per axis, its first variable
NORM_NAME = re.compile(r"[Nn]orm|NORM|LN|RMS|GRN")  # classes that normalise, over channels too
FOLLOWING = {
    "permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "contiguous", "_to_copy", "alias", "detach", "dropout",
    "cat", "mean", "sum", "native_batch_norm", "prelu", "mm", "addmm",
}  # fmt: skip


def _zeros_first(pads: Sequence[int], fields: Sequence[Tensor]) -> Iterator[Tensor]:
    """The labels of the positions that a padding puts before an axis of channels."""
    for label in fields:
        axes = varied(label)
        back = 2 * (label.dim() - 1 - axes[0]) if len(axes) == 1 else len(pads)
        if back < len(pads) and pads[back] > 0:
            yield label.movedim(axes[0], 0).flatten(1)[: pads[back], 0]


def _broken(operator: str, layer: str, error: Exception) -> None:
    """Says that a rule has a bug, which freezes the operator as if it were unknown.

    Raises:
        BrokenRule: instead, where the environment variable `STRICT` is set, as in the tests.
    """
    where = f"{operator} in {layer or 'the model'}"
    if os.environ.get(STRICT):
        raise BrokenRule(f"the rule of {where} failed") from error
    _warn_once(
        f"the rule of {where} failed ({type(error).__name__}); the channels that touch it are kept: please report it"
    )
    log.debug("the rule of %s failed", where, exc_info=error)


@lru_cache(maxsize=256)
def _warn_once(line: str) -> None:
    """A network is analysed again and again."""
    log.warning("%s", line)


class Labeller(Tracer):
    """Executes the dense network on labels."""

    def __init__(self, modules: Modules, constraints: Constraints, trace: Trace, fallbacks: Fallbacks):
        super().__init__(modules)
        self.constraints, self.trace = constraints, trace
        self.levels, self.tied = fallbacks.levels, fallbacks.tied
        self.flattening = False  # inside a flatten, whose sizes are never spelt out
        self.codes: dict[int, tuple[str, str | None, bool]] = {}
        self.used: set[int] = set()  # identities of the tensors that took part
        self.counted: dict[tuple[str, int], Tensor] = {}  # per layer and number in an attribute, what it counted first

    def patches(self) -> ExitStack:
        def marked(flatten: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def flattened(*args: Any, **kwargs: Any) -> Tensor:
                self.flattening = True
                try:
                    return flatten(*args, **kwargs)
                finally:
                    self.flattening = False

            return flattened

        replaced = super().patches()
        for owner in (torch, Tensor):
            replaced.enter_context(patch.object(owner, "flatten", marked(owner.flatten)))
        return replaced

    def about(self, module: nn.Module | None) -> tuple[str, str | None, bool]:
        """A module's code, what its head axes mean and whether it normalises."""
        heads = None
        if has_heads(module):
            heads = "heads"
        if module is not None and (code_of(module) in self.tied or type(module).__name__ in TIED_ATTENTION):
            heads = "dims"
        norm = module is not None and NORM_NAME.search(type(module).__name__) is not None
        found = self.codes[id(module)] = code_of(module), heads, norm
        return found

    def visit(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        layer, module = self.stack[-1]
        code, heads, norm = self.codes.get(id(module)) or self.about(module)
        level = self.levels.get((self.trace.training, self.ordinal), 0) if self.levels else 0
        inputs = tensors(args, kwargs)
        call = Call(name, func, args, kwargs, out, self.constraints, inputs, level, heads, norm, layer)
        found = rule(name, func)
        mark = found or frozen
        labelled = any(marks_of(t).fields for t in inputs)
        self.used.update(map(id, inputs))
        if name == "_local_scalar_dense" and args[0].dtype is torch.bool:
            self.trace.decides.add(layer)
        if not self.trace.literal and not self._follows(call, found, labelled, module):
            self.trace.literal = True
        local = labelled and (name in LOCAL or name in NORM_OPERATORS)
        source = (args[0].shape, marks_of(args[0])) if local else None
        self.constraints.begin(name, layer)
        if found is None and labelled:
            self.trace.unknown[str(func)] = layer
        if call.level >= FROZEN_LEVEL:
            mark = frozen
        try:
            result = mark(call)
        except (Unsupported, ZeroDivisionError, IndexError, ValueError, TypeError, AssertionError) as error:
            if not isinstance(error, Unsupported):
                _broken(str(func), layer, error)
            result = frozen(call)
            if labelled:
                self.trace.unknown[str(func)] = layer
        self._write(call, result, source, code)

    def _follows(self, call: Call, found: Any, labelled: bool, module: nn.Module | None) -> bool:
        """Whether an operator surely follows new widths: no size in its arguments is written by the model's code."""
        if found is factory:
            return all(not isinstance(t, Tensor) or t.dim() < 2 for t in (call.out,))
        if not labelled or found is pointwise:
            return True
        if call.name in ("view", "_unsafe_view"):
            return self.flattening
        if call.name == "convolution":
            return call.args[8] == 1 or isinstance(module, _ConvNd)
        if call.name in ("native_layer_norm", "native_group_norm"):
            return isinstance(module, (nn.LayerNorm, nn.GroupNorm))
        return call.name in FOLLOWING or found is per_channel

    def _write(self, call: Call, result: Result, source: Any, code: str) -> None:
        outs = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
        marks = result if isinstance(result, (tuple, list)) else (result,)
        if len(marks) != len(outs):
            marks = tuple(marks[0] for _ in outs)
        seen = []
        for tensor, mark in zip(outs, marks, strict=True):
            if isinstance(tensor, Tensor):
                mark = self._checked(tensor, mark)
                tensor._prune_marks = mark  # type: ignore[attr-defined]
                shape = tuple(tensor.shape)
                if 0 in tensor.stride():
                    free = {a for a, stride in enumerate(tensor.stride()) if not stride and shape[a] > 1}
                    free -= {a for label in mark.fields for a in varied(label)}
                    shape = tuple(FREE if a in free else n for a, n in enumerate(shape))
                seen.append((shape, mark))
        self.trace.steps.append(
            Step(
                call.name,
                call.func,
                call.layer,
                tuple(seen),
                source,
                call.norm or (source is not None and source[1].kind is Kind.WEIGHT),
                code,
                scalar_of(call.name, call.args),
            )
        )
        if call.heads and call.cut and seen and seen[0][1].fields:
            self.trace.cuts.append(Cut(call.layer, tuple(call.out.shape), seen[0][1].fields[0]))
        if "split" in call.name and len(seen) > 1 and seen[0][1].fields:
            axis = positive_axis(call.arg(2, "dim", 0), call.args[0].dim())
            parts = [[f for f in mark.fields if varied(f) == (axis,)] for _, mark in seen]
            if all(parts):
                lines = tuple(vector(found[0], axis) for found in parts)
                self.trace.splits.append((call.layer, lines))
                if call.name == "split_with_sizes" and not call.level:
                    for line in lines:
                        self._same(call, line)
        self.trace.bounds.extend((call.layer, line) for line in call.bounds if self._same(call, line))
        if call.name == "constant_pad_nd" and seen and seen[0][1].fields:
            self.trace.pads.extend((call.layer, line) for line in _zeros_first(call.args[1], seen[0][1].fields))
        if call.name in ("native_layer_norm", "_fused_rms_norm"):
            axes = len(call.args[1])
            for label in marks_of(call.args[0]).fields:
                self.trace.widths.append((call.layer, tuple(call.args[1]), label[(0,) * (label.dim() - axes)]))

    def _same(self, call: Call, line: Tensor) -> bool:
        """Whether an attribute of the module says how many positions a slice or a split takes; then equal ones stay
        wherever it is used."""
        module = self.stack[-1][1]
        if module is None or not widths_of(module, len(line)):
            return False
        self.constraints.tie(self.counted.setdefault((call.layer, len(line)), line), line)
        return True

    def _checked(self, tensor: Tensor, mark: Marks) -> Marks:
        if all(label.shape == tensor.shape for label in mark.fields):
            return mark
        for label in mark.fields:
            self.constraints.freeze(label)
        return NOTHING


def mark_parameters(
    model: nn.Module, modules: Modules, constraints: Constraints, tied: frozenset[str] = frozenset()
) -> Parameters:
    """Gives every axis of every floating-point parameter and buffer its own variables.

    Returns:
        Per distinct parameter or buffer name: the tensor and, per axis, its first variable.
    """
    found: Parameters = {}
    blank = {  # buffers that may be constant zeros, as a bias of keys that is never trained
        f"{name}.{key}"
        for name, module in modules
        if module._buffers and not isinstance(module, _NormBase)
        for key in module._buffers
        if key.endswith("bias")
    }
    kernels = {id(module._parameters.get("weight")) for _, module in modules if isinstance(module, _ConvNd)}
    for name, tensor in named_tensors(model, again=False).items():
        if not tensor.is_floating_point():
            continue
        first, fields = {}, []
        axes = 2 if id(tensor) in kernels else tensor.dim()  # what is left of a kernel keeps its size
        for axis, size in enumerate(tensor.shape[:axes]):
            if size > 1:
                first[axis] = constraints.count
                fields.append(constraints.fresh_along(axis, tensor.shape))
        zero = type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter) or (name in blank and not tensor.any())
        tensor._prune_marks = Marks(tuple(fields), Kind.WEIGHT, zero)  # type: ignore[attr-defined]
        found[name] = (tensor, first)
    for name, module in modules:
        projection = TIED_ATTENTION.get(type(module).__name__)
        if projection is None and code_of(module) in tied:
            projection = query_projection(module)
        if projection == "in_proj_weight" and module._parameters.get(projection) is None:
            projection = "q_proj_weight"
        full = f"{name}.{projection}" if name else projection
        if projection and full in found:
            tensor, first = found[full]
            fields_ = marks_of(tensor).fields
            if len(fields_) == 2 and tensor.shape[0] in (tensor.shape[1], 3 * tensor.shape[1]):
                constraints.tie(fields_[0][: tensor.shape[1], 0], fields_[1][0])
    return found


def unmark(parameters: Parameters) -> None:
    """Removes the marks from parameters and buffers."""
    for tensor, _ in parameters.values():
        tensor.__dict__.pop("_prune_marks", None)
