"""Executes the dense network on labels: every operator's rule is asked what its output carries."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
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
    LOCAL,
    NORM_OPERATORS,
    BrokenRule,
    Modules,
    Tracer,
    numbers_of,
    scalar_of,
)
from prune_cli.structure.labels import (
    NOTHING,
    Constraints,
    Kind,
    Labelling,
    Work,
    distinct,
    labelling_of,
    varied,
    vector,
)
from prune_cli.structure.looks import Looks
from prune_cli.structure.modules import lendable, may_train_otherwise, named_tensors, names_read
from prune_cli.structure.operators.call import Call, Result, Unsupported, positive_axis, tensors
from prune_cli.structure.operators.mixing import per_channel, pointwise
from prune_cli.structure.operators.statistics import Statistic, followed
from prune_cli.structure.operators.table import factory, frozen, rule
from prune_cli.structure.reads import Ear, Origin, Watch, lent
from prune_cli.structure.sizes import Sizes
from prune_cli.structure.trace import FROZEN_LEVEL, Cut, Fallbacks, Step, Trace

log = logging.getLogger(__name__)
STRICT = "PRUNE_STRICT_RULES"

Parameters = dict[str, tuple[Tensor, dict[int, int]]]  # name -> tensor and, per axis, its first variable
FOLLOWING = {
    "permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "contiguous", "_to_copy", "alias", "detach", "dropout",
    "cat", "mean", "sum", "native_batch_norm", "prelu", "mm", "addmm",
}  # fmt: skip


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
    """Executes the dense network on labels.

    Args:
        modules: of the network, from `walk`.
        constraints: hears what operators say.
        trace: what the run leaves behind.
        fallbacks: what earlier checks have taught.
        looks: follows where the network looks at values.
    """

    def __init__(
        self, modules: Modules, constraints: Constraints, trace: Trace, fallbacks: Fallbacks, looks: Looks
    ) -> None:
        super().__init__(modules)
        self.constraints, self.trace = constraints, trace
        self.levels, self.tied = fallbacks.levels, fallbacks.tied
        self.flattening = False  # inside a flatten, whose sizes are never spelt out
        self.codes: dict[int, tuple[str, str | None]] = {}
        self.used: set[int] = set()  # identities of the tensors that took part
        self.sizes, self.watch, self.ear = Sizes(trace, constraints), Watch(), Ear(self)
        self.reading = False  # whether some module's integers are watched
        self.statistics = False  # whether a mean over channels is on its way
        self.looks = looks
        self.real = self.framed = looks.real

    def begin(self, inputs: Any) -> None:
        self.looks.begin(inputs)

    def returned(self, child: str, given: Any, output: Any) -> None:
        self.looks.returned(self.layer, child, given, output)

    def lend(self) -> None:
        wanted = names_read(self.modules)
        for name, module in self.modules:
            plain = module.__dict__
            for key in lendable(module):
                if key in wanted:
                    plain[key] = lent(name, key, plain[key], self.ear)
                    self.reading = True
            if not self.trace.training and may_train_otherwise(module):
                plain.pop("training", None)  # __getattr__ is asked instead

    def touched(self, origins: Iterable[Origin]) -> None:
        """See `reads.Listener`."""
        self.trace.touched.update((len(self.trace.steps), self.layer, origin) for origin in origins)

    def patches(self) -> ExitStack:
        def marked(flatten: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def flattened(*args: Any, **kwargs: Any) -> Tensor:
                self.flattening = True
                try:
                    return flatten(*args, **kwargs)
                finally:
                    self.flattening = False

            return flattened

        def found(module: nn.Module, key: str) -> Any:
            if key == "training":
                self.trace.trains = True
                return False
            return missing(module, key)

        replaced, missing = super().patches(), nn.Module.__getattr__
        for owner in (torch, Tensor):
            replaced.enter_context(patch.object(owner, "flatten", marked(owner.flatten)))
        if any("training" not in module.__dict__ for _, module in self.modules):
            replaced.enter_context(patch.object(nn.Module, "__getattr__", found))
        replaced.callback(setattr, self.ear, "listener", None)
        self.looks.watch(self, replaced)
        if self.reading:
            replaced.enter_context(self.watch)
        return replaced

    def counted(self) -> list[Work]:
        return self.constraints.work

    def known(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], looks: bool) -> Any:
        return self.looks.answer(self, func, args, kwargs) if looks else None

    def about(self, module: nn.Module | None) -> tuple[str, str | None]:
        """A module's code and what its head axes mean."""
        heads = None
        if has_heads(module):
            heads = "heads"
        if module is not None and (code_of(module) in self.tied or type(module).__name__ in TIED_ATTENTION):
            heads = "dims"
        found = self.codes[id(module)] = code_of(module), heads
        return found

    def visit(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        layer, module = self.stack[-1]
        code, heads = self.codes.get(id(module)) or self.about(module)
        level = self.levels.get((self.trace.kind, self.ordinal), 0) if self.levels else 0
        inputs = tensors(args, kwargs)
        call = Call(name, func, args, kwargs, out, self.constraints, inputs, level, heads, layer)
        found = rule(name, func)
        apply = found or frozen
        labelled = any(labelling_of(t).labels for t in inputs)
        self.used.update(map(id, inputs))
        if not self.trace.literal and not self._follows(call, found, labelled, module):
            self.trace.literal = True
        local = labelled and (name in LOCAL or name in NORM_OPERATORS)
        source = (args[0].shape, labelling_of(args[0])) if local else None
        self.constraints.begin(name, layer)
        if found is None and labelled:
            self.trace.unknown[str(func)] = layer
        if call.level >= FROZEN_LEVEL or (not self.trace.training and torch.Tag.nondeterministic_seeded in func.tags):
            apply = frozen  # numbers drawn for fewer channels are other numbers
        try:
            result = apply(call)
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
        labellings = result if isinstance(result, (tuple, list)) else (result,)
        if len(labellings) != len(outs):
            labellings = tuple(labellings[0] for _ in outs)
        statistic = followed(call) if self.statistics else None
        if call.statistics:
            self.statistics = True
            statistic = Statistic((*call.statistics, *(statistic.labels if statistic else ())))
        seen, dtypes = [], []
        for tensor, labelling in zip(outs, labellings, strict=True):
            if isinstance(tensor, Tensor):
                labelling = self._checked(tensor, labelling)
                tensor._prune_labelling = labelling  # type: ignore[attr-defined]
                if self.statistics:
                    tensor._prune_statistic = statistic  # type: ignore[attr-defined]
                shape = tuple(tensor.shape)
                if 0 in tensor.stride():
                    free = {a for a, stride in enumerate(tensor.stride()) if not stride and shape[a] > 1}
                    free -= {a for label in labelling.labels for a in varied(label)}
                    shape = tuple(FREE if a in free else n for a, n in enumerate(shape))
                seen.append((shape, labelling))
                dtypes.append(tensor.dtype)
        if self.watch.reads:
            self.sizes.record(call, self.watch, [labelling for _, labelling in seen])
        self.looks.saw(call, outs, seen)
        weight = source is not None and source[1].kind is Kind.WEIGHT
        self.trace.steps.append(
            Step(
                call.name,
                call.func,
                call.layer,
                tuple(seen),
                source,
                bool(call.statistics) or weight,
                code,
                scalar_of(call.name, call.args),
                numbers_of(call.name, call.args, call.kwargs),
                tuple(dtypes),
            )
        )
        self._remember(call, seen)

    def _remember(self, call: Call, seen: list[tuple[tuple[int, ...], Labelling]]) -> None:
        """Keeps what attributes near an operator may have to follow."""
        if call.heads and call.cut and seen and seen[0][1].labels:
            self.trace.cuts.append(Cut(call.layer, tuple(call.out.shape), seen[0][1].labels[0]))
        if "split" in call.name and len(seen) > 1 and seen[0][1].labels:
            axis = positive_axis(call.arg(2, "dim", 0), call.args[0].dim())
            parts = [[f for f in labelling.labels if varied(f) == (axis,)] for _, labelling in seen]
            if all(parts):
                self.trace.splits.append((call.layer, tuple(vector(found[0], axis) for found in parts)))
        if call.name in ("native_layer_norm", "_fused_rms_norm"):
            axes = len(call.args[1])
            for label in labelling_of(call.args[0]).labels:
                self.trace.widths.append((call.layer, tuple(call.args[1]), label[(0,) * (label.dim() - axes)]))

    def _checked(self, tensor: Tensor, labelling: Labelling) -> Labelling:
        if all(label.shape == tensor.shape for label in labelling.labels):
            labels = distinct(labelling.labels)
            return labelling if len(labels) == len(labelling.labels) else replace(labelling, labels=labels)
        for label in labelling.labels:
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
        first, labels = {}, []
        axes = 2 if id(tensor) in kernels else tensor.dim()  # what is left of a kernel keeps its size
        for axis, size in enumerate(tensor.shape[:axes]):
            if size > 1:
                first[axis] = constraints.count
                labels.append(constraints.fresh_along(axis, tensor.shape))
        zero = type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter) or (name in blank and not tensor.any())
        tensor._prune_labelling = Labelling(tuple(labels), Kind.WEIGHT, zero)  # type: ignore[attr-defined]
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
            labels_ = labelling_of(tensor).labels
            if len(labels_) == 2 and tensor.shape[0] in (tensor.shape[1], 3 * tensor.shape[1]):
                constraints.tie(labels_[0][: tensor.shape[1], 0], labels_[1][0])
    return found


def unmark(parameters: Parameters) -> None:
    """Removes the labelling from parameters and buffers."""
    for tensor, _ in parameters.values():
        tensor.__dict__.pop("_prune_labelling", None)
