"""Operators that move elements: views, permutations, slices, concatenation, padding, indexing, shuffles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from prune_cli.structure.labels import (
    ANY,
    FIXED,
    Constraints,
    Kind,
    Labelling,
    along,
    beside_labels,
    compact,
    labelling_of,
    slim,
    varied,
    vector,
)
from prune_cli.structure.operators.call import Call, Result, Unsupported, freeze, merge, positive_axis


def moved(call: Call) -> Result:
    """Axis permutations, expansions and flips: the same operator on the labels."""
    labelling = labelling_of(call.args[0])
    kwargs = {k: v for k, v in call.kwargs.items() if k != "memory_format"}
    return replace(labelling, labels=tuple(call.func(label, *call.args[1:], **kwargs) for label in labelling.labels))


def flip(call: Call) -> Result:
    """Flips keep the set of kept positions, mirrored; labels that do not vary stay views."""
    labelling = labelling_of(call.args[0])
    shape = call.out.shape
    return replace(labelling, labels=tuple(call.func(slim(f), *call.args[1:]).expand(shape) for f in labelling.labels))


def repeat(call: Call) -> Result:
    """Repeats: the same operator on the labels, then constant axes are found again; a kernel repeated for every channel
    fits any number of them, and so do places (integers) that are repeated for every channel."""
    source, shape = call.args[0], call.out.shape
    labelling = labelling_of(source)
    if not labelling.labels and source.dim() == len(shape) and not source.is_floating_point():
        wide = [axis for axis, n in enumerate(source.shape) if n == 1 < shape[axis]]
        return Labelling(tuple(along(call.constraints.fresh(shape[axis]), axis, shape) for axis in wide))
    labels = [compact(call.func(label, *call.args[1:], **call.kwargs)) for label in labelling.labels]
    if labelling.kind is Kind.WEIGHT and source.dim() == len(shape) > 2 and source.shape[0] == 1 < shape[0]:
        labels.append(along(call.constraints.fresh(shape[0]), 0, shape))
        labelling = replace(labelling, zero=False)
    return replace(labelling, labels=tuple(labels))


def roll(call: Call) -> Result:
    """Rolling along an axis that carries labels moves positions by a literal: frozen; other axes change
    nothing."""
    source = call.args[0]
    labelling = labelling_of(source)
    dims = [positive_axis(d, source.dim()) for d in call.arg(2, "dims", ()) or range(source.dim())]
    if any(set(varied(label)) & set(dims) for label in labelling.labels):
        raise Unsupported
    return labelling


@lru_cache(maxsize=8192)
def _regroup(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Pairs of axis groups with equal products: how a view merges and splits axes."""
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        left, right = [], []
        a = b = 1
        if i < len(before):
            a, i, left = before[i], i + 1, [i]
        if j < len(after):
            b, j, right = after[j], j + 1, [j]
        while a != b:
            if (a < b and i < len(before)) or j >= len(after):
                a, left, i = a * before[i], [*left, i], i + 1
            else:
                b, right, j = b * after[j], [*right, j], j + 1
        groups.append((tuple(left), tuple(right)))
    return tuple(groups)


def reshape(call: Call) -> Result:
    """Views: the same view on the labels. A view that cuts an axis must stay a product."""
    source, out = call.args[0], call.out
    labelling = labelling_of(source)
    if not labelling.labels:
        return labelling
    if 0 in source.shape:
        raise Unsupported
    groups = _regroup(tuple(source.shape), tuple(out.shape))
    labels: list[Tensor] = []
    for label in labelling.labels:
        axes = set(varied(label))
        small, target = slim(label), list(out.shape)
        full = list(small.shape)
        cuts: list[tuple[int, ...]] = []
        for before, after in groups:
            mine = axes & set(before)
            if not mine:
                for axis in after:
                    target[axis] = 1
                continue
            for axis in before:
                full[axis] = source.shape[axis]
            wide = tuple(axis for axis in after if out.shape[axis] > 1)
            old = [source.shape[axis] for axis in before if source.shape[axis] > 1]
            if len(wide) > 1 and old != [out.shape[axis] for axis in wide]:
                cuts.append(wide)
        small = small.expand(full)
        view = small.reshape(target)
        if len(axes) > 1 or cuts:
            view = compact(view)
        for wide in cuts:
            view = _cut(call, view, wide, len(axes))
        view = view.expand(out.shape)
        if labelling.kind is Kind.DATA and any(set(varied(view)) & set(varied(other)) for other in labels):
            # One axis, two choices (heads, and widths that all heads share): the first shrinks.
            call.constraints.freeze(view)
        else:
            labels.append(view)
    return replace(labelling, labels=tuple(labels))


def _cut(call: Call, label: Tensor, wide: tuple[int, ...], before: int) -> Tensor:
    axes = tuple(axis for axis in wide if axis in varied(label))
    if len(axes) <= before and len(axes) < 2:
        return label
    call.cut = True
    mode = ["tie", "first", "last", "freeze"][min(call.level, 3)] if call.heads is None else call.heads
    if call.heads is not None and call.level:
        mode = "freeze"
    if mode == "freeze":
        call.constraints.freeze(label)
    elif mode == "heads":
        return call.constraints.tie_along(label, axes[-1:])
    elif mode in ("dims", "last"):
        return call.constraints.tie_along(label, axes[:-1])
    elif mode == "first":
        return call.constraints.tie_along(label, axes[1:])
    else:
        call.constraints.product(label)
    return label


def slices(call: Call) -> Result:
    """`x[a:b:c]`: equal parts of an axis shrink together; a literal bound fixes what lies before it."""
    source, out = call.args[0], call.out
    axis = positive_axis(call.arg(1, "dim", 0), source.dim())
    n, kept = source.shape[axis], out.shape[axis]
    start = call.arg(2, "start") or 0
    start = min(max(start + n if start < 0 else start, 0), n)
    step = call.arg(4, "step", 1)
    labels = []
    labelling = labelling_of(source)
    for label in labelling.labels:
        if axis in varied(label) and kept < n:
            label = _cut_part(call, label, axis, start, kept, step)
        labels.append(
            label.narrow(axis, start, n - start)[(slice(None),) * axis + (slice(None, None, step),)].narrow(
                axis, 0, kept
            )
        )
    return replace(labelling, labels=tuple(labels))


def _cut_part(call: Call, label: Tensor, axis: int, start: int, kept: int, step: int) -> Tensor:
    n = label.shape[axis]
    constraints = call.constraints
    if call.level <= 1 and kept and varied(label) != (axis,):
        return constraints.tie_along(label, (axis,))  # one axis of several that were cut: whole heads
    if varied(label) != (axis,) or call.level > 1 or kept == 0:
        constraints.freeze(label)
        return label
    line = vector(label, axis)
    if call.level == 0 and step == 1:
        first, last = call.arg(2, "start") or 0, call.arg(3, "end")
        call.bounds = [line[start:] if first < 0 else line[:start]] if start else []
        if start + kept < n:
            call.bounds.append(line[start + kept :] if last < 0 else line[: start + kept])
    if call.level == 0 and step > 1 and n % step == 0 and start < step:
        constraints.tie_along(line.reshape(-1, step), (1,))
    elif call.level == 0 and step == 1:
        if n % kept == 0 and start % kept == 0:
            constraints.product(line.reshape(-1, kept))
    elif step > 1:
        constraints.freeze(label)
    else:
        constraints.freeze(line[: start + kept] if start + kept < n else line[:start])
    return label


def split(call: Call) -> Result:
    """`split` and `chunk`: equal parts shrink together; unequal parts follow attributes, or are
    frozen."""
    source, outs = call.args[0], call.out
    axis = positive_axis(call.arg(2, "dim", 0), source.dim())
    labelling = labelling_of(source)
    sizes = [part.shape[axis] for part in outs]
    labels = list(labelling.labels)
    for number, label in enumerate(labels):
        if axis not in varied(label) or len(outs) == 1:
            continue
        if call.level:
            call.constraints.freeze(label)
        elif varied(label) != (axis,):
            labels[number] = call.constraints.tie_along(label, (axis,))  # as slices
        elif len(set(sizes)) == 1:
            call.constraints.product(vector(label, axis).reshape(len(sizes), -1))
        elif call.name != "split_with_sizes":
            call.constraints.freeze(label)
    parts = [label.split(sizes, axis) for label in labels]
    return [replace(labelling, labels=tuple(part[i] for part in parts)) for i in range(len(outs))]


def select_op(call: Call) -> Result:
    """`x[i]` and `unbind`: along an axis with labels all positions are one."""
    source = call.args[0]
    axis = positive_axis(call.arg(1, "dim", 0), source.dim())
    labelling = labelling_of(source)
    labels = []
    for label in labelling.labels:
        if varied(label) == (axis,):
            if call.level == 0 and call.name == "select" and call.arg(2, "index") >= 0:
                call.constraints.freeze(vector(label, axis)[: call.arg(2, "index") + 1])
                continue
            call.constraints.freeze(label)
            continue
        call.constraints.tie_along(label, (axis,))
        labels.append(label)
    if call.name == "select":
        return replace(labelling, labels=tuple(label.select(axis, call.arg(2, "index")) for label in labels))
    return [replace(labelling, labels=tuple(label.select(axis, i) for label in labels)) for i in range(len(call.out))]


def cat(call: Call) -> Result:
    """Concatenation: labels are concatenated along the axis and equal along the others."""
    parts = [part for part in call.args[0] if part.numel() or part.dim() > 1]
    out = call.out
    rank = out.dim()
    axis = positive_axis(call.arg(1, "dim", 0), rank)
    if call.name == "stack":
        single = list(out.shape)
        single[axis] = 1
        part_labellings = [
            replace(m, labels=tuple(f.unsqueeze(axis) for f in m.labels)) for m in map(labelling_of, parts)
        ]
        shapes = [tuple(single)] * len(parts)
    else:
        part_labellings, shapes = [labelling_of(p) for p in parts], [tuple(p.shape) for p in parts]
    across: list[tuple[Labelling, Sequence[int]]] = []
    line: list[Tensor | None] = []
    for labelling, shape in zip(part_labellings, shapes, strict=True):
        mine = [label for label in labelling.labels if axis in varied(label)]
        if len(mine) > 1:
            raise Unsupported
        line.append(mine[0] if mine else None)
        others = tuple(label for label in labelling.labels if axis not in varied(label))
        size = tuple(1 if d == axis else n for d, n in enumerate(shape))
        spread = {d for label in mine for d in varied(label)}
        size = tuple(1 if d in spread else n for d, n in enumerate(size))
        across.append((replace(labelling, labels=tuple(_head(f, axis) for f in others)), size))
    line_shape = tuple(1 if d == axis else n for d, n in enumerate(out.shape))
    labels = [label.expand(out.shape) for label in merge(call, line_shape, across)]
    if any(label is not None for label in line):
        labels.append(_cat_line(call.constraints, line, part_labellings, shapes, axis).expand(out.shape))
    kinds = {labelling.kind for labelling in part_labellings}
    kind = kinds.pop() if len(kinds) == 1 else Kind.DATA
    return Labelling(
        tuple(labels), kind, all(m.zero or m.kind is Kind.UNIFORM or not m.labels for m in part_labellings)
    )


def _head(label: Tensor, axis: int) -> Tensor:
    """One position along an axis, which may have none: a part that is empty must fit the others all the same."""
    if label.shape[axis]:
        return label.narrow(axis, 0, 1)
    size = [1 if other == axis else n for other, n in enumerate(label.shape)]
    last = label.storage_offset() + sum((n - 1) * stride for n, stride in zip(size, label.stride(), strict=True) if n)
    if label.untyped_storage().nbytes() <= 8 * last:
        raise Unsupported
    return label.as_strided(size, label.stride())


def _cat_line(
    constraints: Constraints,
    line: list[Tensor | None],
    labellings: list[Labelling],
    shapes: list[tuple[int, ...]],
    axis: int,
) -> Tensor:
    spread = {d for label in line if label is not None for d in varied(label)} | {axis}
    pieces = []
    for label, labelling, shape in zip(line, labellings, shapes, strict=True):
        size = [n if d in spread else 1 for d, n in enumerate(shape)]
        if label is None:
            piece = torch.full(size, FIXED, dtype=torch.int64)
            if labelling.kind is Kind.UNIFORM:
                piece = constraints.fresh(piece.numel()).reshape(size)
            pieces.append(piece)
        else:
            pieces.append(slim(label).expand(size))
    return torch.cat(pieces, axis)


def padded(label: Tensor, pads: Sequence[int], value: int) -> Tensor:
    """Constant padding of labels (last axis first, as in `constant_pad_nd`)."""
    rank = label.dim()
    before = [0] * rank
    size = list(label.shape)
    for i in range(len(pads) // 2):
        axis = rank - 1 - i
        before[axis] = pads[2 * i]
        size[axis] += pads[2 * i] + pads[2 * i + 1]
    result = torch.full(size, value, dtype=torch.int64)
    result[tuple(slice(b, b + n) for b, n in zip(before, label.shape, strict=True))] = label
    return result


def pad(call: Call) -> Result:
    """Constant padding: along an axis with labels the new positions fit anything (level 0) or stay (level
    1)."""
    source, out = call.args[0], call.out
    labelling = labelling_of(source)
    pads, value = call.args[1], call.arg(2, "value", 0)
    labels = []
    for label in labelling.labels:
        axes = varied(label)
        cut = list(pads)
        for axis in range(source.dim()):
            back = 2 * (source.dim() - 1 - axis)
            if axis not in axes and back < len(cut):
                cut[back] = cut[back + 1] = 0
        if any(cut):
            if call.level > 1 or min(cut) < 0:
                raise Unsupported
            free = call.level == 0 and value == 0
            label = padded(slim(label), cut, ANY if free else FIXED)
            if free and len(axes) == 1:  # new positions are variables of their own: what meets them decides
                new = label == ANY
                label[new] = call.constraints.fresh(int(new.sum()))
        labels.append(slim(label).expand(out.shape))
    return replace(labelling, labels=tuple(labels), zero=labelling.zero and value == 0)


def index(call: Call) -> Result:
    """Indexing with tensors: along the axes that are indexed the positions of a label are one, the others move."""
    source, out = call.args[0], call.out
    labelling = labelling_of(source)
    if call.name == "index_select":
        axes, func_args = {positive_axis(call.args[1], source.dim())}, call.args[1:]
    else:
        axes, func_args = set(), call.args[1:]
        axis = 0
        for item in call.args[1]:
            width = item.dim() if item is not None and item.dtype in (torch.bool, torch.uint8) else 1
            if item is not None:
                axes |= set(range(axis, axis + width))
            axis += width
    labels = []
    for label in labelling.labels:
        if set(varied(label)) <= axes:
            call.constraints.freeze(label)
            continue
        label = call.constraints.tie_along(label, tuple(axes))
        if 0 in out.shape and out.dim() == source.dim() and len(axes) == 1:  # rows that the data choose: none here
            axis = next(iter(axes))
            labels.append(label.narrow(axis, 0, 1).expand(out.shape))
            continue
        labels.append(compact(call.func(label.contiguous(), *beside_labels(func_args))))
    if any(label.shape != out.shape for label in labels):
        raise Unsupported
    freeze(call, func_args)
    return replace(labelling, labels=tuple(labels))


def pixel_shuffle(call: Call) -> Result:
    """r*r neighbouring channels become one plane: they live together."""
    source, out = call.args[0], call.out
    labelling = labelling_of(source)
    axis = source.dim() - 3
    labels = []
    for label in labelling.labels:
        if varied(label) != (axis,):
            raise Unsupported
        group = vector(label, axis).reshape(out.shape[axis], -1)
        call.constraints.tie_along(group, (1,))
        labels.append(along(group[:, 0], axis, out.shape))
    return replace(labelling, labels=tuple(labels))


def pixel_unshuffle(call: Call) -> Result:
    """One channel becomes r*r neighbouring ones; unfold does the same with its window."""
    source, out = call.args[0], call.out
    labelling = labelling_of(source)
    axis = source.dim() - 3
    labels = []
    for label in labelling.labels:
        if varied(label) != (axis,):
            raise Unsupported
        copies = out.shape[axis] // source.shape[axis]
        labels.append(along(vector(label, axis).repeat_interleave(copies), axis, out.shape))
    return replace(labelling, labels=tuple(labels))


def fold(call: Call) -> Result:
    """The inverse of unfold: the window's positions of a channel live together."""
    source, out = call.args[0], call.out
    axis = source.dim() - 2
    labels = []
    for label in labelling_of(source).labels:
        if varied(label) != (axis,):
            raise Unsupported
        group = vector(label, axis).reshape(out.shape[axis], -1)
        call.constraints.tie_along(group, (1,))
        labels.append(along(group[:, 0], axis, out.shape))
    return replace(labelling_of(source), labels=tuple(labels))


def windows(call: Call) -> Result:
    """`Tensor.unfold` and pairs of real numbers as complex ones: along axes without labels only."""
    source = call.args[0]
    axis = positive_axis(call.args[1] if call.name == "unfold" else -1, source.dim())
    labelling = labelling_of(source)
    if call.name != "view_as_real":
        for label in labelling.labels:
            if axis in varied(label):
                call.constraints.freeze(label)
        labelling = replace(labelling, labels=tuple(label for label in labelling.labels if axis not in varied(label)))
    if call.name == "unfold":
        return replace(labelling, labels=tuple(call.func(label, *call.args[1:]) for label in labelling.labels))
    shape = call.out.shape
    if call.name == "view_as_real":
        return replace(labelling, labels=tuple(label.unsqueeze(-1).expand(shape) for label in labelling.labels))
    return replace(labelling, labels=tuple(label.select(-1, 0) for label in labelling.labels))


def channel_shuffle(call: Call) -> Result:
    """Groups of channels are interleaved: equal positions in every group live together."""
    source, out = call.args[0], call.out
    labelling = labelling_of(source)
    labels = []
    for label in labelling.labels:
        if varied(label) != (1,) or call.level:
            raise Unsupported
        parts = vector(label, 1).reshape(call.args[1], -1)
        call.constraints.product(parts)
        labels.append(along(parts.t().reshape(-1), 1, out.shape))
    return replace(labelling, labels=tuple(labels))
