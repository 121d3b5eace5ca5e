"""Operators that combine elements: elementwise ones, reductions, softmax, pooling, gates and norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prune_cli.structure.labels import Kind, Marks, marks_of, slim, varied, vector
from prune_cli.structure.operators.call import (
    ASIDE,
    Call,
    Result,
    Unsupported,
    extent,
    freeze,
    merge,
    positive_axis,
    tensors,
)
from prune_cli.structure.operators.statistics import STATISTICS


@lru_cache(maxsize=4096)
def _keeps_zero(func: Any, key: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> bool:
    """Whether an elementwise operator maps 0 in the flagged operands to 0, whatever the others hold."""
    for other in (1.3, -0.7):
        args = [
            torch.tensor(0.0 if value[1] else other > 0 if value[2] is torch.bool else other).to(value[2])
            if isinstance(value, tuple) and len(value) == 3 and value[0] == "t"
            else value
            for value in key
        ]
        try:
            if float(func(*args, **dict(kwargs))) != 0.0:
                return False
        except (RuntimeError, TypeError, ValueError):
            return False
    return True


def pointwise(call: Call) -> Result:
    """Elementwise operators: labels that meet are equal; an axis that meets constant data is frozen."""
    out = call.out
    inputs = call.inputs
    labelled = [t for t in inputs if marks_of(t).fields]
    if not labelled:
        numbers = {marks_of(t).kind for t in inputs}
        kinds = {marks_of(t).kind for t in inputs if t.dim()} or (numbers if numbers == {Kind.WEIGHT} else {Kind.DATA})
        for kind in (Kind.DATA, Kind.WEIGHT, Kind.UNIFORM):
            if kind in kinds:
                return Marks(kind=kind)
    first = marks_of(labelled[0])
    if len(inputs) == 1 and inputs[0].shape == out.shape:
        fields = first.fields
    else:
        fields = merge(call, out.shape, [(marks_of(t), extent(t)) for t in inputs])
    kind = Kind.WEIGHT if all(marks_of(t).kind is not Kind.DATA or not t.dim() for t in inputs) else Kind.DATA
    return Marks(fields, kind, _pointwise_zero(call, fields))


def _pointwise_zero(call: Call, fields: tuple[Tensor, ...]) -> bool:
    full = {axis for label in fields for axis in varied(label)}
    rank = call.out.dim()
    key: list[Any] = []
    for value in call.args:
        if isinstance(value, Tensor):
            marks = marks_of(value)
            axes = {axis + rank - value.dim() for label in marks.fields for axis in varied(label)}
            key.append(("t", marks.zero and axes >= full, value.dtype))
        else:
            key.append(value)
    kwargs = {name: value for name, value in call.kwargs.items() if not isinstance(value, Tensor)}
    try:
        return _keeps_zero(call.func, tuple(key), tuple(kwargs.items()))
    except TypeError:  # an argument that can't be hashed
        return False


def same(call: Call) -> Result:
    """The output holds the input's elements at the same places."""
    return marks_of(call.args[0])


def reduction(call: Call) -> Result:
    """Sums drop labels of exact zeros; other reductions make one variable of what they mix."""
    source = call.args[0]
    marks = marks_of(source)
    results = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
    if not marks.fields:
        return tuple(replace(marks, zero=False) for _ in results) if len(results) > 1 else marks
    dims = _reduced(call, source)
    keep = results[0].dim() == source.dim()
    norm = marks.kind is Kind.WEIGHT  # what is said of a weight is said of the part that is kept
    statistic = call.name in STATISTICS  # what it serves for is seen later
    linear = call.name in ("sum", "linalg_vector_norm", "norm", "nansum")
    fields = []
    for label in marks.fields:
        mixed = tuple(axis for axis in varied(label) if axis in dims)
        if mixed:
            rest = set(varied(label)) - set(mixed)
            if norm or statistic:
                call.constraints.norms.append(slim(label).reshape(-1).numpy())
            if rest:
                label = call.constraints.tie_along(label, mixed)
            elif norm or (linear and marks.zero and call.level == 0):
                continue
            elif statistic:
                call.statistics.append(label)
                continue
            else:
                call.constraints.freeze(label)
                continue
        for axis in dims:
            label = label.narrow(axis, 0, 1)
        if not keep:
            for axis in sorted(dims, reverse=True):
                label = label.squeeze(axis)
        fields.append(label)
    zero = marks.zero and call.name in (
        "sum",
        "mean",
        "amax",
        "amin",
        "linalg_vector_norm",
        "norm",
        "max",
        "min",
        "var",
        "std",
        "var_mean",
        "std_mean",
    )
    of_weight = marks.kind is Kind.WEIGHT and not results[0].dim()  # a number that follows what is kept of the weight
    result = Marks(tuple(fields), marks.kind if fields or of_weight else Kind.DATA, zero)
    return result if len(results) == 1 else tuple(result for _ in results)


def _reduced(call: Call, source: Tensor) -> set[int]:
    position = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    dims = call.arg(position, "dim")
    if dims is None or isinstance(dims, (bool, float)) or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(source.dim()))
    return {positive_axis(d, source.dim()) for d in ([dims] if isinstance(dims, int) else dims)}


def mixing(call: Call) -> Result:
    """Softmax, cumulative sums, sorts: every position along the axis sees the others, so they are one
    variable; but a softmax is taken over the channels that are kept, like a norm."""
    source = call.args[0]
    marks = marks_of(source)
    position = 2 if call.name in ("topk", "kthvalue") else 1
    axis = positive_axis(call.arg(position, "dim", -1), max(source.dim(), 1))
    normed = call.name in ("_softmax", "_safe_softmax") and call.level == 0
    zero = False
    fields = []
    for label in marks.fields:
        if axis in varied(label):
            if varied(label) == (axis,):
                if normed:
                    call.constraints.norms.append(vector(label, axis).numpy())
                    fields.append(label)
                    zero = len(marks.fields) == 1
                    continue
                call.constraints.freeze(label)
                continue
            label = call.constraints.tie_along(label, (axis,))
        fields.append(label)
    marks = replace(marks, fields=tuple(fields), zero=zero, kind=marks.kind if fields else Kind.DATA)
    outs = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
    if zero or axis in {a for label in fields for a in varied(label)}:
        return marks
    fits = tuple(replace(marks, fields=tuple(f.narrow(axis, 0, 1).expand(o.shape) for f in marks.fields)) for o in outs)
    return fits if isinstance(call.out, (tuple, list)) else fits[0]


def per_channel(call: Call) -> Result:
    """Pooling, resizing and reflecting: channels keep to themselves, the trailing (spatial) axes are
    mixed."""
    source = call.args[0]
    out = call.out[0] if isinstance(call.out, (tuple, list)) else call.out
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 2)
    if "linear1d" in call.name:
        spatial = 1
    marks = marks_of(source)
    trailing = tuple(range(source.dim() - spatial, source.dim()))
    fields = []
    for label in marks.fields:
        label = call.constraints.tie_along(label, trailing)
        for axis in trailing:
            label = label.narrow(axis, 0, 1)
        fields.append(label.expand(out.shape))
    freeze(call, *tensors(call.args[1:]))
    marks = replace(marks, fields=tuple(fields))
    return tuple(marks for _ in call.out) if isinstance(call.out, (tuple, list)) else marks


def grid_sample(call: Call) -> Result:
    """Each channel is read at the same places; where they are must not depend on what is removed."""
    source, grid = call.args[:2]
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    others = (0, *range(2, source.dim()))
    fields = []
    for label in marks_of(source).fields:
        label = call.constraints.tie_along(label, others)
        for axis in others:
            label = label.narrow(axis, 0, 1)
        fields.append(label.expand(out.shape))
    freeze(call, grid)
    result = replace(marks_of(source), fields=tuple(fields))
    return (result, *[ASIDE] * (len(call.out) - 1)) if isinstance(call.out, tuple) else result


def fourier(call: Call) -> Result:
    """Transforms mix the axes that they run along; the others keep to themselves."""
    source, dims = call.args[:2]
    axes = tuple(positive_axis(d, source.dim()) for d in dims)
    fields = []
    for label in marks_of(source).fields:
        label = call.constraints.tie_along(label, axes)
        for axis in axes:
            label = label.narrow(axis, 0, 1)
        fields.append(label.expand(call.out.shape))
    return replace(marks_of(source), fields=tuple(fields))


def glu(call: Call) -> Result:
    """The halves of an axis gate one another: equal positions live together."""
    source = call.args[0]
    axis = positive_axis(call.arg(1, "dim", -1), source.dim())
    marks = marks_of(source)
    half = source.shape[axis] // 2
    fields = []
    for label in marks.fields:
        if axis in varied(label):
            call.constraints.tie(label.narrow(axis, 0, half), label.narrow(axis, half, half))
        fields.append(label.narrow(axis, 0, half))
    return replace(marks, fields=tuple(fields))


def _affine(call: Call, fields: tuple[Marks, Sequence[int]], axes: tuple[int, ...], values: list[Any]) -> Marks:
    """Per-channel parameters and buffers along `axes` of the input."""
    source, _ = fields
    shape = call.args[0].shape
    operands: list[tuple[Marks, Sequence[int]]] = [(source, shape)]
    for value in values:
        if isinstance(value, Tensor):
            size = [1] * len(shape)
            for axis, n in zip(axes, value.shape, strict=True):
                size[axis] = n
            marks = marks_of(value)
            operands.append((replace(marks, fields=tuple(f.reshape(size) for f in marks.fields)), size))
    return replace(source, fields=merge(call, shape, operands), kind=Kind.DATA)


def _along_channels(call: Call, marks: Marks, values: tuple[Any, ...]) -> bool:
    """The short way for one field along the channels and plain vectors; False leaves everything undone."""
    if len(marks.fields) != 1 or varied(marks.fields[0]) != (1,):
        return False
    lines = [vector(marks.fields[0], 1).numpy()]
    for value in values:
        if value is not None:
            fields = marks_of(value).fields
            if len(fields) != 1 or not fields[0].is_contiguous():
                return False
            lines.append(fields[0].numpy())
    if any(len(line) != len(lines[0]) for line in lines) or (lines[0] < 0).any():
        return False
    call.constraints.edges += [(lines[0], line) for line in lines[1:]]
    return True


def batch_norm(call: Call) -> Result:
    """Batch norm: weight, bias and running statistics belong to the channels; with affine parameters 0
    stays 0."""
    source, weight, bias, mean, var, training = call.args[:6]
    marks = marks_of(source)
    if marks.kind is Kind.WEIGHT and training and source.dim() == 3 and source.shape[0] == 1:
        return (_standardised(call, marks, weight, bias), ASIDE, ASIDE)
    if _along_channels(call, marks, (weight, bias, mean, var)):
        zero = marks_of(weight).zero if weight is not None else bool(training) and marks.zero
        return (replace(marks, kind=Kind.DATA, zero=zero), ASIDE, ASIDE)
    tied = tuple(call.constraints.tie_along(f, tuple(a for a in range(source.dim()) if a != 1)) for f in marks.fields)
    marks = replace(marks, fields=tied)
    result = _affine(call, (marks, source.shape), (1,), [weight, bias, mean, var])
    result = replace(result, zero=weight is not None and marks_of(weight).zero)
    if weight is None and training:
        result = replace(result, zero=marks.zero)
    return (result, ASIDE, ASIDE)


def _standardised(call: Call, marks: Marks, weight: Any, bias: Any) -> Marks:
    """A weight (1, out, in * kernel) that a batch norm standardises: over the inputs that are kept, like a norm."""
    for label in marks.fields:
        if 2 in varied(label):
            if varied(label) != (2,):
                raise Unsupported
            call.constraints.norms.append(vector(label, 2).numpy())
    result = _affine(call, (marks, call.args[0].shape), (1,), [weight, bias])
    zero = marks.zero if weight is None else marks_of(weight).zero
    return replace(result, kind=Kind.WEIGHT, zero=zero and (bias is None or marks_of(bias).zero))


def layer_norm(call: Call) -> Result:
    """Layer norm: the parameters belong to the normalised axes; the norm is taken over what is kept."""
    source, shape, weight, bias = (*call.args, None, None)[:4]
    marks = marks_of(source)
    axes = tuple(range(source.dim() - len(shape), source.dim()))
    for label in marks.fields:
        if set(varied(label)) & set(axes):
            call.constraints.norms.append(slim(label).reshape(-1).numpy())
    if call.level:
        raise Unsupported
    result = _affine(call, (marks, source.shape), axes, [weight, bias])
    result = replace(result, zero=weight is not None and bias is not None)
    return (result, ASIDE, ASIDE) if isinstance(call.out, (tuple, list)) else result


def group_norm(call: Call) -> Result:
    """Group norm: equal positions of every group live together; each group is normalised over what is
    kept."""
    source, weight, bias = call.args[:3]
    groups = call.args[6]
    marks = marks_of(source)
    fields = []
    for label in marks.fields:
        label = call.constraints.tie_along(label, tuple(a for a in range(source.dim()) if a != 1))
        if 1 in varied(label):
            line = vector(label, 1)
            if groups < source.shape[1]:
                call.constraints.norms.append(line.numpy())
                call.constraints.product(line.reshape(groups, -1))
        fields.append(label)
    if call.level:
        raise Unsupported
    result = _affine(call, (replace(marks, fields=tuple(fields)), source.shape), (1,), [weight, bias])
    return (replace(result, zero=weight is not None), ASIDE, ASIDE)


def prelu(call: Call) -> Result:
    """One slope per channel (axis 1), or one for all."""
    source, slope = call.args[:2]
    marks = marks_of(source)
    if slope.numel() == 1:
        return replace(marks, kind=Kind.DATA)
    return replace(_affine(call, (marks, source.shape), (min(1, source.dim() - 1),), [slope]), zero=marks.zero)


def weight_norm(call: Call) -> Result:
    """`v * g / |v|`: labels of v, g's along its axis."""
    v, g = call.args[:2]
    fields = merge(call, v.shape, [(marks_of(v), v.shape), (marks_of(g), g.shape)])
    return (Marks(fields, Kind.WEIGHT, True), ASIDE)
