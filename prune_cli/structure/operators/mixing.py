"""Operators that combine elements: elementwise ones, reductions, softmax, pooling, gates and norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prune_cli.structure.labels import Kind, Labelling, labelling_of, slim, varied, vector
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
    labelled = [t for t in inputs if labelling_of(t).labels]
    if not labelled:
        numbers = {labelling_of(t).kind for t in inputs}
        kinds = {labelling_of(t).kind for t in inputs if t.dim()} or (
            numbers if numbers == {Kind.WEIGHT} else {Kind.DATA}
        )
        for kind in (Kind.DATA, Kind.WEIGHT, Kind.UNIFORM):
            if kind in kinds:
                return Labelling(kind=kind)
    first = labelling_of(labelled[0])
    if len(inputs) == 1 and inputs[0].shape == out.shape:
        labels = first.labels
    else:
        labels = merge(call, out.shape, [(labelling_of(t), extent(t)) for t in inputs])
    kind = Kind.WEIGHT if all(labelling_of(t).kind is not Kind.DATA or not t.dim() for t in inputs) else Kind.DATA
    return Labelling(labels, kind, _pointwise_zero(call, labels))


def _pointwise_zero(call: Call, labels: tuple[Tensor, ...]) -> bool:
    full = {axis for label in labels for axis in varied(label)}
    rank = call.out.dim()
    key: list[Any] = []
    for value in call.args:
        if isinstance(value, Tensor):
            labelling = labelling_of(value)
            axes = {axis + rank - value.dim() for label in labelling.labels for axis in varied(label)}
            key.append(("t", labelling.zero and axes >= full, value.dtype))
        else:
            key.append(value)
    kwargs = {name: value for name, value in call.kwargs.items() if not isinstance(value, Tensor)}
    try:
        return _keeps_zero(call.func, tuple(key), tuple(kwargs.items()))
    except TypeError:  # an argument that can't be hashed
        return False


def same(call: Call) -> Result:
    """The output holds the input's elements at the same places."""
    return labelling_of(call.args[0])


def reduction(call: Call) -> Result:
    """Sums drop labels of exact zeros; other reductions make one variable of what they mix."""
    source = call.args[0]
    labelling = labelling_of(source)
    results = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
    if not labelling.labels:
        return tuple(replace(labelling, zero=False) for _ in results) if len(results) > 1 else labelling
    dims = _reduced(call, source)
    keep = results[0].dim() == source.dim()
    norm = labelling.kind is Kind.WEIGHT  # what is said of a weight is said of the part that is kept
    statistic = call.name in STATISTICS  # what it serves for is seen later
    linear = call.name in ("sum", "linalg_vector_norm", "norm", "nansum")
    labels = []
    for label in labelling.labels:
        mixed = tuple(axis for axis in varied(label) if axis in dims)
        if mixed:
            rest = set(varied(label)) - set(mixed)
            if norm or statistic:
                call.constraints.norms.append(slim(label).reshape(-1).numpy())
            if rest:
                label = call.constraints.tie_along(label, mixed)
            elif norm or (linear and labelling.zero and call.level == 0):
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
        labels.append(label)
    zero = labelling.zero and call.name in (
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
    of_weight = (
        labelling.kind is Kind.WEIGHT and not results[0].dim()
    )  # a number that follows what is kept of the weight
    result = Labelling(tuple(labels), labelling.kind if labels or of_weight else Kind.DATA, zero)
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
    labelling = labelling_of(source)
    position = 2 if call.name in ("topk", "kthvalue") else 1
    axis = positive_axis(call.arg(position, "dim", -1), max(source.dim(), 1))
    normed = call.name in ("_softmax", "_safe_softmax") and call.level == 0
    zero = False
    labels = []
    for label in labelling.labels:
        if axis in varied(label):
            if varied(label) == (axis,):
                if normed:
                    call.constraints.norms.append(vector(label, axis).numpy())
                    labels.append(label)
                    zero = len(labelling.labels) == 1
                    continue
                call.constraints.freeze(label)
                continue
            label = call.constraints.tie_along(label, (axis,))
        labels.append(label)
    labelling = replace(labelling, labels=tuple(labels), zero=zero, kind=labelling.kind if labels else Kind.DATA)
    outs = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
    if zero or axis in {a for label in labels for a in varied(label)}:
        return labelling
    fits = tuple(
        replace(labelling, labels=tuple(f.narrow(axis, 0, 1).expand(o.shape) for f in labelling.labels)) for o in outs
    )
    return fits if isinstance(call.out, (tuple, list)) else fits[0]


def per_channel(call: Call) -> Result:
    """Pooling, resizing and reflecting: channels keep to themselves, the trailing (spatial) axes are
    mixed."""
    source = call.args[0]
    out = call.out[0] if isinstance(call.out, (tuple, list)) else call.out
    spatial = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 2)
    if "linear1d" in call.name:
        spatial = 1
    labelling = labelling_of(source)
    trailing = tuple(range(source.dim() - spatial, source.dim()))
    labels = []
    for label in labelling.labels:
        label = call.constraints.tie_along(label, trailing)
        for axis in trailing:
            label = label.narrow(axis, 0, 1)
        labels.append(label.expand(out.shape))
    freeze(call, *tensors(call.args[1:]))
    labelling = replace(labelling, labels=tuple(labels))
    return tuple(labelling for _ in call.out) if isinstance(call.out, (tuple, list)) else labelling


def grid_sample(call: Call) -> Result:
    """Each channel is read at the same places; where they are must not depend on what is removed."""
    source, grid = call.args[:2]
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    others = (0, *range(2, source.dim()))
    labels = []
    for label in labelling_of(source).labels:
        label = call.constraints.tie_along(label, others)
        for axis in others:
            label = label.narrow(axis, 0, 1)
        labels.append(label.expand(out.shape))
    freeze(call, grid)
    result = replace(labelling_of(source), labels=tuple(labels))
    return (result, *[ASIDE] * (len(call.out) - 1)) if isinstance(call.out, tuple) else result


def fourier(call: Call) -> Result:
    """Transforms mix the axes that they run along; the others keep to themselves."""
    source, dims = call.args[:2]
    axes = tuple(positive_axis(d, source.dim()) for d in dims)
    labels = []
    for label in labelling_of(source).labels:
        label = call.constraints.tie_along(label, axes)
        for axis in axes:
            label = label.narrow(axis, 0, 1)
        labels.append(label.expand(call.out.shape))
    return replace(labelling_of(source), labels=tuple(labels))


def glu(call: Call) -> Result:
    """The halves of an axis gate one another: equal positions live together."""
    source = call.args[0]
    axis = positive_axis(call.arg(1, "dim", -1), source.dim())
    labelling = labelling_of(source)
    half = source.shape[axis] // 2
    labels = []
    for label in labelling.labels:
        if axis in varied(label):
            call.constraints.tie(label.narrow(axis, 0, half), label.narrow(axis, half, half))
        labels.append(label.narrow(axis, 0, half))
    return replace(labelling, labels=tuple(labels))


def _affine(call: Call, labels: tuple[Labelling, Sequence[int]], axes: tuple[int, ...], values: list[Any]) -> Labelling:
    """Per-channel parameters and buffers along `axes` of the input."""
    source, _ = labels
    shape = call.args[0].shape
    operands: list[tuple[Labelling, Sequence[int]]] = [(source, shape)]
    for value in values:
        if isinstance(value, Tensor):
            size = [1] * len(shape)
            for axis, n in zip(axes, value.shape, strict=True):
                size[axis] = n
            labelling = labelling_of(value)
            operands.append((replace(labelling, labels=tuple(f.reshape(size) for f in labelling.labels)), size))
    return replace(source, labels=merge(call, shape, operands), kind=Kind.DATA)


def _along_channels(call: Call, labelling: Labelling, values: tuple[Any, ...]) -> bool:
    """The short way for one label along the channels and plain vectors; False leaves everything undone."""
    if len(labelling.labels) != 1 or varied(labelling.labels[0]) != (1,):
        return False
    lines = [vector(labelling.labels[0], 1).numpy()]
    for value in values:
        if value is not None:
            labels = labelling_of(value).labels
            if len(labels) != 1 or not labels[0].is_contiguous():
                return False
            lines.append(labels[0].numpy())
    if any(len(line) != len(lines[0]) for line in lines) or (lines[0] < 0).any():
        return False
    call.constraints.edges += [(lines[0], line) for line in lines[1:]]
    return True


def batch_norm(call: Call) -> Result:
    """Batch norm: weight, bias and running statistics belong to the channels; with affine parameters 0
    stays 0."""
    source, weight, bias, mean, var, training = call.args[:6]
    labelling = labelling_of(source)
    if labelling.kind is Kind.WEIGHT and training and source.dim() == 3 and source.shape[0] == 1:
        return (_standardised(call, labelling, weight, bias), ASIDE, ASIDE)
    if _along_channels(call, labelling, (weight, bias, mean, var)):
        zero = labelling_of(weight).zero if weight is not None else bool(training) and labelling.zero
        return (replace(labelling, kind=Kind.DATA, zero=zero), ASIDE, ASIDE)
    tied = tuple(
        call.constraints.tie_along(f, tuple(a for a in range(source.dim()) if a != 1)) for f in labelling.labels
    )
    labelling = replace(labelling, labels=tied)
    result = _affine(call, (labelling, source.shape), (1,), [weight, bias, mean, var])
    result = replace(result, zero=weight is not None and labelling_of(weight).zero)
    if weight is None and training:
        result = replace(result, zero=labelling.zero)
    return (result, ASIDE, ASIDE)


def _standardised(call: Call, labelling: Labelling, weight: Any, bias: Any) -> Labelling:
    """A weight (1, out, in * kernel) that a batch norm standardises: over the inputs that are kept, like a norm."""
    for label in labelling.labels:
        if 2 in varied(label):
            if varied(label) != (2,):
                raise Unsupported
            call.constraints.norms.append(vector(label, 2).numpy())
    result = _affine(call, (labelling, call.args[0].shape), (1,), [weight, bias])
    zero = labelling.zero if weight is None else labelling_of(weight).zero
    return replace(result, kind=Kind.WEIGHT, zero=zero and (bias is None or labelling_of(bias).zero))


def layer_norm(call: Call) -> Result:
    """Layer norm: the parameters belong to the normalised axes; the norm is taken over what is kept."""
    source, shape, weight, bias = (*call.args, None, None)[:4]
    labelling = labelling_of(source)
    axes = tuple(range(source.dim() - len(shape), source.dim()))
    for label in labelling.labels:
        if set(varied(label)) & set(axes):
            call.constraints.norms.append(slim(label).reshape(-1).numpy())
    if call.level:
        raise Unsupported
    result = _affine(call, (labelling, source.shape), axes, [weight, bias])
    result = replace(result, zero=weight is not None and bias is not None)
    return (result, ASIDE, ASIDE) if isinstance(call.out, (tuple, list)) else result


def group_norm(call: Call) -> Result:
    """Group norm: equal positions of every group live together; each group is normalised over what is
    kept."""
    source, weight, bias = call.args[:3]
    groups = call.args[6]
    labelling = labelling_of(source)
    labels = []
    for label in labelling.labels:
        label = call.constraints.tie_along(label, tuple(a for a in range(source.dim()) if a != 1))
        if 1 in varied(label):
            line = vector(label, 1)
            if groups < source.shape[1]:
                call.constraints.norms.append(line.numpy())
                call.constraints.product(line.reshape(groups, -1))
        labels.append(label)
    if call.level:
        raise Unsupported
    result = _affine(call, (replace(labelling, labels=tuple(labels)), source.shape), (1,), [weight, bias])
    return (replace(result, zero=weight is not None), ASIDE, ASIDE)


def prelu(call: Call) -> Result:
    """One slope per channel (axis 1), or one for all."""
    source, slope = call.args[:2]
    labelling = labelling_of(source)
    if slope.numel() == 1:
        return replace(labelling, kind=Kind.DATA)
    return replace(_affine(call, (labelling, source.shape), (min(1, source.dim() - 1),), [slope]), zero=labelling.zero)


def weight_norm(call: Call) -> Result:
    """`v * g / |v|`: labels of v, g's along its axis."""
    v, g = call.args[:2]
    labels = merge(call, v.shape, [(labelling_of(v), v.shape), (labelling_of(g), g.shape)])
    return (Labelling(labels, Kind.WEIGHT, True), ASIDE)
