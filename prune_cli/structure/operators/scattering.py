"""Operators that read or write rows at places that data name: gather, scatter, index_add, packed sequences.

Along the axis of the places positions are mixed by data, so labels there stay; along every other axis each channel keeps
to itself, which is what messages between nodes and choices of tokens need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from prune_cli.structure.labels import NOTHING, Kind, Labelling, labelling_of, varied
from prune_cli.structure.operators.call import Call, Result, Unsupported, extent, freeze, merge, positive_axis


def _aligned(call: Call, tensor: Tensor, axis: int, shape: Sequence[int]) -> tuple[Labelling, Sequence[int]]:
    """An operand's labels beside `axis`, which is cut to one position; where it is read or written in part, they stay."""
    labels = []
    for label in labelling_of(tensor).labels:
        axes = varied(label)
        if axis in axes or any(tensor.shape[other] != shape[other] for other in axes):
            call.constraints.freeze(label)
        else:
            labels.append(label.narrow(axis, 0, 1))
    size = [1 if other == axis else n for other, n in enumerate(extent(tensor))]
    return replace(labelling_of(tensor), labels=tuple(labels)), size


def gather(call: Call) -> Result:
    """`x.gather(axis, places)`: places say the same of every channel, or go with the channels."""
    source, places = call.args[0], call.args[2]
    axis = positive_axis(call.args[1], max(source.dim(), 1))
    shape = call.out.shape
    line = [1 if other == axis else n for other, n in enumerate(shape)]
    operands = [_aligned(call, tensor, axis, shape) for tensor in (source, places)]
    labels = tuple(label.expand(shape) for label in merge(call, line, operands))
    return Labelling(labels, Kind.DATA, bool(labels) and labelling_of(source).zero)


def scatter(call: Call) -> Result:
    """`index_add`, `scatter_reduce` and their kin: what is written and where it goes are equal beside the axis."""
    target, places = call.args[0], call.args[2]
    if target._base is not None and call.out is target:  # written into a part of something larger
        freeze(call, target._base)
        raise Unsupported
    axis = positive_axis(call.args[1], max(target.dim(), 1))
    value = call.arg(3, "value")
    written = [value] if isinstance(value, Tensor) and value.dim() == target.dim() else []
    if isinstance(value, Tensor) and not written:
        raise Unsupported
    if places.dim() == target.dim() and "index_" not in call.name:
        written.append(places)
    else:
        freeze(call, places)
    shape = call.out.shape
    line = [1 if other == axis else n for other, n in enumerate(shape)]
    operands = [_aligned(call, tensor, axis, shape) for tensor in (target, *written)]
    labels = tuple(label.expand(shape) for label in merge(call, line, operands))
    if isinstance(value, Tensor):
        zero = labelling_of(value).zero
    else:
        zero = value == 0
    return Labelling(labels, Kind.DATA, bool(labels) and zero and labelling_of(target).zero)


def pack(call: Call) -> Result:
    """`pack_padded_sequence`: steps and sequences become one axis, features stay."""
    data = call.out[0]
    labels = []
    for label in labelling_of(call.args[0]).labels:
        if min(varied(label), default=2) < 2:
            call.constraints.freeze(label)
        else:
            labels.append(label[0, 0].expand(data.shape))
    return (replace(labelling_of(call.args[0]), labels=tuple(labels), kind=Kind.DATA), NOTHING)


def unpack(call: Call) -> Result:
    """`pad_packed_sequence`, the inverse."""
    padded, value = call.out[0], call.arg(3, "padding_value", 0)
    labels = []
    for label in labelling_of(call.args[0]).labels:
        if 0 in varied(label):
            call.constraints.freeze(label)
        else:
            labels.append(label[0].expand(padded.shape))
    labelling = labelling_of(call.args[0])
    return (Labelling(tuple(labels), Kind.DATA, labelling.zero and value == 0), NOTHING)
