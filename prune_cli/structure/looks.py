"""Where a network looks at values of its data: which code runs, or how many rows there are, may depend on the input.

Labels need no arithmetic, so a first run is on zeros. A network that looks at values is run again on real ones: what depends
on the input is followed, conditions can be answered the other way, and what the small network finds at the same places is
what the dense one found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prune_cli.structure.labels import DECIDES, Constraints, Kind, Labelling, labelling_of
from prune_cli.structure.operators.call import Call, tensors
from prune_cli.structure.trace import Look, Trace

if TYPE_CHECKING:
    from prune_cli.structure.interpreter import Tracer

ARRAYS = ("numpy", "tolist")  # `__array__` calls the first
LARGEST = 1 << 22  # elements of a tensor that is remembered
BESIDE = {"_pack_padded_sequence": (1, 1)}  # an output that depends on one argument alone: numbers of both


class Looks:
    """Follows one run on labels.

    Args:
        trace: of the run.
        real: whether it is on real values.
        flip: which condition is answered the other way; -1 none.
    """

    def __init__(self, trace: Trace, *, real: bool = False, flip: int = -1) -> None:
        self.trace, self.real, self.flip = trace, real, flip
        self.conditions = 0
        self.flipped_at: int | None = None  # the number of the operator
        self.frames: list[
            tuple[str, Tensor]
        ] = []  # layer, labels of what its own code passes to modules or gets from them
        self.returns: set[tuple[str, str]] = set()  # modules that return numbers, and who gets them
        if real:
            trace.values, trace.flips = {}, flip

    def begin(self, inputs: Any) -> None:
        """Marks the inputs, so that what depends on them is known."""
        for tensor in tree_leaves(inputs) if self.real else ():
            if isinstance(tensor, Tensor):
                tensor._prune_data = True  # type: ignore[attr-defined]

    def answer(self, run: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator that looks at values gives; None where that is yet to be computed."""
        given = tensors(args, kwargs)
        if run.current.startswith("index") and not any(t.dtype in (torch.bool, torch.uint8) for t in given[1:]):
            return None
        if not self.real:
            if any(labelling_of(t).kind is Kind.DATA for t in given):
                self.trace.looks.append(Look(run.layer, run.current, _kind(func, given)))
            return None
        out = func(*args, **kwargs)
        if not any(getattr(t, "_prune_data", False) for t in given):
            return out
        kind = _kind(func, given)
        if kind == "condition":
            if self.conditions == self.flip:
                out, self.flipped_at = not out, run.ordinal
            self.conditions += 1
        self.trace.looks.append(Look(run.layer, run.current, kind))
        if kind != "rows" and self.trace.values is not None:
            self.trace.values[run.ordinal] = out
        return out

    def saw(self, call: Call, outs: Sequence[Any], labellings: Sequence[tuple[Any, Labelling]]) -> None:
        """Passes on what depends on the input, and remembers whole numbers and conditions in tensors."""
        if not self.real or not any(getattr(t, "_prune_data", False) for t in call.inputs):
            return
        made = [tensor for tensor in outs if isinstance(tensor, Tensor)]
        output, argument = BESIDE.get(call.func._schema.name[6:], (None, 0))
        beside = None if output is None or getattr(call.args[argument], "_prune_data", False) else output
        for tensor in [tensor for index, tensor in enumerate(made) if index != beside]:
            tensor._prune_data = True  # type: ignore[attr-defined]
            if tensor._base is not None:
                tensor._base._prune_data = True  # type: ignore[attr-defined]
        rows = torch.Tag.dynamic_output_shape in call.func.tags
        returned = call.func._schema.returns
        if self.trace.values is None or (returned and returned[0].alias_info and not call.func._schema.is_mutable):
            return
        known = [
            None if t.is_floating_point() or labelling.labels or t.numel() > LARGEST else t.clone()
            for t, (_, labelling) in zip(made, labellings, strict=True)
        ]
        if made and (rows or any(t is not None for t in known)):
            self.trace.values[len(self.trace.steps)] = known

    def returned(self, parent: str, child: str, given: Any, output: Any) -> None:
        """Sees the end of a module's call."""
        for value in tree_leaves((given, output)):
            if isinstance(value, Tensor):
                self.frames += [(parent, label) for label in labelling_of(value).labels]
        if any(isinstance(value, (int, float)) for value in tree_leaves(output)):
            self.returns.add((child, parent))

    def freeze(self, layers: set[str], constraints: Constraints) -> None:
        """Keeps the channels that the code of these modules, and of whoever gets numbers from them, has in its hands."""
        while further := {parent for child, parent in self.returns if child in layers} - layers:
            layers |= further
        if layers:
            constraints.begin(DECIDES, f"{min(layers) or 'the model'} looks at values of its data")
        for layer, label in self.frames:
            if layer in layers:
                constraints.freeze(label)
        for step in self.trace.steps:
            for _, labelling in step.outs if step.layer in layers else ():
                for label in labelling.labels:
                    constraints.freeze(label)

    def watch(self, run: Tracer, replaced: ExitStack) -> None:
        """Watches what leaves torch for numpy and lists."""

        def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                result = original(tensor, *args, **kwargs)
                if run.busy:  # no code of the network
                    return result
                depends = getattr(tensor, "_prune_data", False) if self.real else labelling_of(tensor).kind is Kind.DATA
                if depends:
                    self.trace.looks.append(Look(run.layer, name, "number"))
                self.trace.arrays.append(result)
                return result

            return call

        for name in ARRAYS:
            replaced.enter_context(patch.object(Tensor, name, watched(name, getattr(Tensor, name))))


def replayed(run: Tracer, trace: Trace, replaced: ExitStack) -> None:
    """Gives the small network the arrays that the dense one saw."""
    if trace.values is None or not trace.arrays:
        return
    left: Iterator[Any] = iter(trace.arrays)

    def again(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            for result in () if run.busy else left:
                return result
            return original(tensor, *args, **kwargs)

        return call

    for name in ARRAYS:
        replaced.enter_context(patch.object(Tensor, name, again(getattr(Tensor, name))))


def _kind(func: Any, given: Sequence[Tensor]) -> str:
    if torch.Tag.dynamic_output_shape in func.tags:
        return "rows"
    name = func._schema.name[6:]
    condition = name != "_local_scalar_dense" or given[0].dtype is torch.bool
    return "condition" if condition else "number"
