"""One executed operator as a rule sees it, and what most rules need.

A rule gets the call with its real arguments and output and returns the labelling of the output. Rules take a *level*, which
the check after surgery raises for an operator that could not follow the new widths: level 0 trusts the code to follow,
higher levels fix the sizes that the code spells out, the last level freezes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prune_cli.structure.labels import ANY, Constraints, Kind, Labelling, labelling_of, slim, varied


@dataclass(slots=True)
class Call:
    """One executed operator and where it happened.

    Attributes:
        name: operator name without overload, a trailing underscore of in-place relatives removed.
        inputs: the tensors among the arguments, lists opened.
        level: how often the check after surgery has refused this operator.
        heads: in attention, what the axes of a split mean: `"heads"` prunes whole heads, `"dims"` the same
            positions in every head, `None` leaves the choice to the equations.
        layer: dotted name of the module being executed.
    """

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    constraints: Constraints
    inputs: list[Tensor]
    level: int = 0
    heads: str | None = None
    layer: str = ""
    cut: bool = False  # set by a view that cut an axis with labels
    bounds: Sequence[Tensor] = ()  # set by a slice: the positions that its bounds count
    statistics: list[Tensor] = field(default_factory=list)  # set by a mean: the channels that it was taken over

    def arg(self, position: int, keyword: str = "", default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(keyword, default)


ASIDE = Labelling(kind=Kind.UNIFORM)  # a second output that nobody reads, such as a norm's saved statistics
Result = Labelling | tuple[Labelling, ...] | list[Labelling]


class Unsupported(Exception):
    """The rule can't follow this call; its labels are frozen."""


def positive_axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


def tensors(*values: Any) -> list[Tensor]:
    """The tensors among arguments, lists opened."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            if value and type(value[0]) is not int:
                found += tensors(*value)
        elif isinstance(value, dict) and value:
            found += tensors(*value.values())
    return found


def extent(tensor: Tensor) -> tuple[int, ...]:
    """The shape with axes along which the tensor is an expanded constant as 1: there it fits any width."""
    return tuple(n if stride else 1 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def freeze(call: Call, *values: Any) -> None:
    """Freezes every label of the tensors."""
    for tensor in tensors(*values):
        for label in labelling_of(tensor).labels:
            call.constraints.freeze(label)


def align(label: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcasts a label to an output's shape."""
    return label if label.shape == torch.Size(shape) else label.expand(shape)


def merge(call: Call, shape: Sequence[int], operands: list[tuple[Labelling, Sequence[int]]]) -> tuple[Tensor, ...]:
    """Unifies the labels of operands that meet element by element.

    Args:
        call: the operator.
        shape: shape of the output.
        operands: labelling of each operand, and the operand's shape as it is broadcast (same rank or shorter).

    Returns:
        The labels of the output; labels that meet constant data along all of their axes are frozen and end here.
    """
    merged: list[tuple[Tensor, tuple[int, ...]]] = []
    for labelling, _ in operands:
        for raw in labelling.labels:
            label = align(raw, shape)
            axes = varied(label)
            rest: list[tuple[Tensor, tuple[int, ...]]] = []
            for other, others in merged:
                if not set(axes) & set(others):
                    rest.append((other, others))
                    continue
                call.constraints.tie(other, label)
                label, axes = _narrower((other, others), (label, axes))
            merged = [*rest, (label, axes)]
    for labelling, size in operands:
        if labelling.kind is Kind.UNIFORM:
            continue
        offset = len(shape) - len(size)
        extents = {axis + offset for axis, n in enumerate(size) if n > 1}
        for label in labelling.labels:
            extents -= set(varied(align(label, shape)))
        for number, (label, axes) in enumerate(merged):
            met = extents & set(axes)
            if met and met == set(axes):
                call.constraints.freeze(label)
            elif met:  # an axis was cut, and the constant varies along a part: whole heads
                label = call.constraints.tie_along(label, tuple(met))
                merged[number] = label, varied(label)
        merged = [item for item in merged if not extents & set(item[1])]
    return tuple(label for label, _ in merged)


def _narrower(
    first: tuple[Tensor, tuple[int, ...]], second: tuple[Tensor, tuple[int, ...]]
) -> tuple[Tensor, tuple[int, ...]]:
    """Of two tied labels the one that varies along fewer axes, with `ANY` filled in from the other."""
    if len(second[1]) < len(first[1]):
        first, second = second, first
    label, axes = first
    if bool((slim(label) == ANY).any()):
        a, b = torch.broadcast_tensors(slim(label), slim(second[0]))
        label = torch.where(a == ANY, b, a).expand(label.shape)
        axes = varied(label)
    return label, axes
