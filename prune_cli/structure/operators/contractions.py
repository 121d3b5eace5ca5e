"""Operators that multiply and sum: convolutions, matrix products, embeddings. Here inputs meet weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prune_cli.structure.labels import (
    ANY,
    FIXED,
    NOTHING,
    Constraints,
    Kind,
    Labelling,
    Work,
    along,
    labelling_of,
    slim,
    varied,
    vector,
)
from prune_cli.structure.operators.call import ASIDE, Call, Result, Unsupported, extent, freeze, merge


def _field_at(labelling: Labelling, axis: int) -> Tensor | None:
    found = [label for label in labelling.labels if axis in varied(label)]
    if len(found) > 1:
        raise Unsupported
    return found[0] if found else None


def convolution(call: Call) -> Result:
    """Convolutions: inputs tie to the weight's input axis; groups keep equal positions, or live and die
    whole."""
    source, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    out, constraints = call.out, call.constraints
    unbatched = source.dim() < weight.dim()
    if unbatched:
        raise Unsupported
    labelling, weights = labelling_of(source), labelling_of(weight)
    if not transposed and (plain := _plain_convolution(call, labelling, weights)) is not None:
        return plain
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    for label in weights.labels:
        if set(varied(label)) - {0, 1}:
            constraints.freeze(label)
    w_out, w_in = (
        None if f is None else vector(f, a) for f, a in ((_field_at(weights, a), a) for a in (out_axis, in_axis))
    )
    x = _field_at(labelling, 1)
    for label in labelling.labels:
        if label is not x:
            constraints.freeze(label)
    if x is not None:
        x = vector(constraints.tie_along(x, tuple(a for a in range(source.dim()) if a != 1)), 1)
    elif labelling.kind is Kind.UNIFORM:
        x = torch.full((source.shape[1],), ANY)
    else:
        x = torch.full((source.shape[1],), FIXED)
    single = groups > 1 and weight.shape[in_axis] == (groups if transposed else 1)
    if not (labelling.zero or weights.zero or single):  # what is removed would still add something
        constraints.freeze(x)
    if transposed and groups > 1:
        w_out, w_in = _transposed_groups(constraints, x, w_out, w_in, groups, weight)
    elif groups > 1:
        w_out, w_in = _groups(constraints, x, w_out, w_in, groups, weight)
    elif w_in is not None:
        constraints.tie(x, w_in)
        constraints.consumers.append(w_in.numpy())
    elif bool((x > 0).any()):
        constraints.freeze(x)
    labels: tuple[Tensor, ...] = ()
    if w_out is not None:
        labels = merge(
            call,
            out.shape,
            [(Labelling((along(w_out, 1, out.shape),), Kind.WEIGHT, True), out.shape), _bias(bias, out.dim())],
        )
    elif bias is not None:
        freeze(call, bias)
    _count_convolution(call, weight, transposed)
    zero = (weights.zero or (single and labelling.zero)) and (bias is None or labelling_of(bias).zero)
    return Labelling(labels, Kind.DATA, bool(labels) and zero)


def _plain_convolution(call: Call, labelling: Labelling, weights: Labelling) -> Labelling | None:
    """The short way for labelled channels and an ordinary or depthwise kernel; None leaves everything undone."""
    source, weight, bias, groups = *call.args[:3], call.args[8]
    constraints = call.constraints
    if len(labelling.labels) != 1 or varied(labelling.labels[0]) != (1,):
        return None
    lines = [vector(labelling.labels[0], 1).numpy()]
    if (lines[0] < 0).any():
        return None
    outs, depthwise = weight.shape[0], groups > 1
    if not (weights.zero or (depthwise and labelling.zero)) or not (bias is None or labelling_of(bias).zero):
        return None
    if depthwise and (weight.shape[1] != 1 or outs != groups or groups != source.shape[1]):
        return None
    spread = [varied(label) for label in weights.labels]
    channel_axes = 1 if depthwise else 2
    if spread[:channel_axes] != [(0,), (1,)][:channel_axes] or any(axes[0] < 2 for axes in spread[channel_axes:]):
        return None
    biases = () if bias is None else labelling_of(bias).labels
    if bias is not None and (len(biases) != 1 or varied(biases[0]) != (0,)):
        return None
    for label in weights.labels[channel_axes:]:  # the kernel
        constraints.freeze(label)
    w_out = vector(weights.labels[0], 0)
    total = source.shape[0] * math.prod(call.out.shape[2:]) * weight.numel()
    if depthwise:
        constraints.edges.append((lines[0], w_out.numpy()))
        constraints.work.append(Work(call.layer, total // outs, (w_out,)))
    else:
        w_in = vector(weights.labels[1], 1)
        constraints.edges.append((lines[0], w_in.numpy()))
        constraints.consumers.append(w_in.numpy())
        constraints.producers.append(w_out.numpy())
        constraints.work.append(Work(call.layer, total // (outs * weight.shape[1]), (w_out, w_in)))
    constraints.edges += [(w_out.numpy(), label.numpy()) for label in biases]
    return Labelling((along(w_out, 1, call.out.shape),), Kind.DATA, True)


def _bias(bias: Tensor | None, rank: int) -> tuple[Labelling, tuple[int, ...]]:
    if bias is None:
        return NOTHING, ()
    size = (1, bias.shape[0], *([1] * (rank - 2)))
    labelling = labelling_of(bias)
    return replace(labelling, labels=tuple(f.reshape(size) for f in labelling.labels)), size


def _groups(
    constraints: Constraints, x: Tensor, w_out: Tensor | None, w_in: Tensor | None, groups: int, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """A grouped convolution, weight (out, in / groups, ...)."""
    inputs = x.reshape(groups, -1)
    if w_out is None:
        if len(x) == groups == len(weight) and bool((weight == weight[:1]).all()):  # one constant kernel for all
            return x, w_in
        constraints.freeze(x)
        return w_out, w_in
    outputs = w_out.reshape(groups, -1)
    if weight.shape[1] == 1:  # one input channel per group: a group lives and dies with it
        constraints.tie(inputs.expand(outputs.shape), outputs)
        return w_out, None
    if w_in is None:
        constraints.freeze(x)
    else:
        constraints.tie(inputs, w_in.unsqueeze(0).expand(inputs.shape))
        constraints.consumers.append(w_in.numpy())
    constraints.tie(outputs, outputs[:1].expand(outputs.shape))
    constraints.producers.append(w_out.numpy())
    return w_out, w_in


def _transposed_groups(
    constraints: Constraints, x: Tensor, w_out: Tensor | None, w_in: Tensor | None, groups: int, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """A grouped transposed convolution, weight (in, out / groups, ...)."""
    inputs = x.reshape(groups, -1)
    if inputs.shape[1] == 1 and w_in is not None:
        per_group = weight.shape[1]
        constraints.tie(x, w_in)
        if w_out is not None:  # several outputs per group: which ones is the same in every group, so they stay
            constraints.freeze(w_out)
        return w_in.repeat_interleave(per_group), None
    if w_in is not None:
        constraints.tie(x, w_in)
        constraints.tie(inputs, inputs[:1].expand(inputs.shape))
        constraints.consumers.append(w_in.numpy())
    if w_out is None:
        return None, w_in
    constraints.producers.append(w_out.numpy())
    return w_out.repeat(groups), w_in


def _count_convolution(call: Call, weight: Tensor, transposed: bool) -> None:
    source, groups = call.args[0], call.args[8]
    spatial = source.shape[2:] if transposed else call.out.shape[2:]
    total = source.shape[0] * math.prod(spatial) * weight.numel()
    factors = tuple(vector(f, a) for f in labelling_of(weight).labels for a in varied(f) if a < 2)
    if factors and transposed and groups > 1 and weight.shape[0] == groups and len(factors) > 1:
        factors = factors[:1]
    carried = labelling_of(source).labels if groups == source.shape[1] == weight.shape[0] and not factors else ()
    if len(carried) == 1 and varied(carried[0]) == (1,):  # a constant kernel per channel
        factors = (vector(carried[0], 1),)
    static = total // math.prod(f.numel() for f in factors)
    call.constraints.work.append(Work(call.layer, static, factors))
    if not (groups > 1 and source.shape[1] == groups):
        out = _field_at(labelling_of(weight), 1 if transposed else 0)
        if out is not None:
            call.constraints.producers.append(vector(out, 1 if transposed else 0).numpy())


def matmul(call: Call) -> Result:
    """Matrix products, batched or not, with or without a bias."""
    bias, args = None, call.args
    if call.name in ("addmm", "baddbmm"):
        bias, args = args[0], args[1:]
    left, right = args[0], args[1]
    if call.name == "mv":
        raise Unsupported
    out = call.out
    a, b = labelling_of(left), labelling_of(right)
    ka, kb = left.dim() - 1, right.dim() - 2
    mine = _contract(call, (a, ka), (b, kb), left.shape[ka])
    operands: list[tuple[Labelling, Sequence[int]]] = []
    shape_a, shape_b = (*extent(left)[:-1], 1), (*extent(right)[:-2], 1, extent(right)[-1])
    if len(shape_a) == len(shape_b):
        fields_a = tuple(f.narrow(ka, 0, 1) for f in mine[0])
        fields_b = tuple(f.narrow(kb, 0, 1) for f in mine[1])
        operands = [(replace(a, labels=fields_a), shape_a), (replace(b, labels=fields_b), shape_b)]
    if a.kind is Kind.WEIGHT and b.kind is not Kind.WEIGHT:
        call.constraints.producers += [slim(f).reshape(-1).numpy() for f in mine[0]]
    elif b.kind is Kind.WEIGHT:
        call.constraints.producers += [slim(f).reshape(-1).numpy() for f in mine[1]]
    both = bool(mine[0]) and bool(mine[1]) and {varied(f) for f in mine[0]} == {varied(f) for f in mine[1]}
    zero = (a.zero or b.zero) if both else (a.zero or not mine[0]) and (b.zero or not mine[1])
    if bias is not None:
        operands.append((labelling_of(bias), bias.shape))
        zero = zero and labelling_of(bias).zero
    labels = merge(call, out.shape, operands)
    _count_matmul(call, a, b, left, right)
    kind = Kind.WEIGHT if a.kind is b.kind is Kind.WEIGHT else Kind.DATA
    if not labels and kind is Kind.WEIGHT:
        kind = Kind.DATA
    return Labelling(labels, kind, bool(labels) and zero)


def _contract(
    call: Call, left: tuple[Labelling, int], right: tuple[Labelling, int], size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Ties the contracted axis; returns the labels of either side that live on in the output."""
    constraints = call.constraints
    (a, ka), (b, kb) = left, right
    on_a, on_b = ([f for f in m.labels if k in varied(f)] for m, k in (left, right))
    rest_a, rest_b = ([f for f in m.labels if k not in varied(f)] for m, k in (left, right))
    if not on_a and not on_b:
        return rest_a, rest_b
    if len(on_a) > 1 or len(on_b) > 1 or call.level:
        for label in (*on_a, *on_b):
            constraints.freeze(label)
        return rest_a, rest_b
    if on_a and on_b:
        constraints.tie(on_a[0].unsqueeze(-1), on_b[0].unsqueeze(-3))
    else:
        label, other = (on_a[0], b) if on_a else (on_b[0], a)
        if other.kind is not Kind.UNIFORM:
            constraints.freeze(label)
    if not (a.zero or b.zero):
        for label in (*on_a, *on_b):
            constraints.freeze(label)
    if b.kind is Kind.WEIGHT:
        constraints.consumers += [slim(f).reshape(-1).numpy() for f in on_b]
    elif a.kind is Kind.WEIGHT:
        constraints.consumers += [slim(f).reshape(-1).numpy() for f in on_a]
    for labels, k, rest in ((on_a, ka, rest_a), (on_b, kb, rest_b)):
        batch = set(range(k)) if labels is on_a else set(range(kb))
        for label in labels:
            if set(varied(label)) & batch - {ka - 1 if labels is on_a else -1}:
                rest.append(constraints.tie_along(label, (k,)))  # whole heads
    return rest_a, rest_b


def grouped_matmul(call: Call) -> Result:
    """Rows that each go through one of several matrices, (rows, k) x (experts, k, m): experts stay, k and m are shared."""
    left, right = call.args[:2]
    if left.dim() == right.dim() == 3:
        return matmul(call)
    if left.dim() != 2 or right.dim() != 3:
        raise Unsupported
    a, b, shape, bias = labelling_of(left), labelling_of(right), call.out.shape, call.arg(3, "bias")
    rest_a, rest_b = _contract(call, (a, 1), (b, 1), left.shape[1])
    for label in (f for f in (*rest_a, *rest_b) if varied(f) != (2,)):
        call.constraints.freeze(label)
    lines = [vector(f, 2) for f in rest_b if varied(f) == (2,)]
    if b.kind is Kind.WEIGHT:
        call.constraints.producers += [line.numpy() for line in lines]
    operands: list[tuple[Labelling, Sequence[int]]] = [
        (Labelling(tuple(along(line, 1, shape) for line in lines), Kind.WEIGHT), shape)
    ]
    if bias is not None:  # (experts, m)
        added = labelling_of(bias)
        for label in (f for f in added.labels if varied(f) != (1,)):
            call.constraints.freeze(label)
        of_columns = tuple(along(vector(f, 1), 1, shape) for f in added.labels if varied(f) == (1,))
        operands.append((replace(added, labels=of_columns), (1, *bias.shape[1:])))
    labels = merge(call, shape, operands)
    factors = (*lines[:1], *(vector(f, 1) for f in b.labels if varied(f) == (1,)))
    static = left.numel() * shape[1] // math.prod(f.numel() for f in factors)
    call.constraints.work.append(Work(call.layer, static, factors))
    return Labelling(labels, Kind.DATA, bool(labels) and b.zero and (bias is None or labelling_of(bias).zero))


def bilinear(call: Call) -> Result:
    """`nn.Bilinear`: x1 and x2 meet the second and third axis of a weight (out, in1, in2), whose first is the output's."""
    left, weight, right = call.args[:3]
    if [list(axes) for axes in call.args[3:7]] != [[1, 3], [0], [1, 2], [2, 3]]:
        raise Unsupported
    weights = labelling_of(weight)
    if any(len(varied(f)) != 1 for f in weights.labels):
        raise Unsupported
    lines = {varied(f)[0]: vector(f, varied(f)[0]) for f in weights.labels}
    for tensor, axis in ((left, 1), (right, 2)):
        labelling, own = labelling_of(tensor), [lines[axis]] if axis in lines else []
        for label in (f for f in labelling.labels if varied(f) != (1,)):
            call.constraints.freeze(label)
        met = [vector(f, 1) for f in labelling.labels if varied(f) == (1,)]
        if not met and labelling.kind is Kind.UNIFORM:
            continue
        _meet(call, [*met, *own], zero=labelling.zero or weights.zero)
        call.constraints.consumers += [line.numpy() for line in own]
    call.constraints.work.append(
        Work(call.layer, left.shape[0] * weight.numel() // math.prod(map(len, lines.values())), tuple(lines.values()))
    )
    if 0 not in lines:
        return NOTHING
    call.constraints.producers.append(lines[0].numpy())
    return Labelling((along(lines[0], 1, call.out.shape),), Kind.DATA, weights.zero)


def vector_product(call: Call) -> Result:
    """`mv`, `dot` and `vdot`: a matrix or a vector times a vector, as spectral_norm does with weights."""
    left, right = call.args[:2]
    a, b = labelling_of(left), labelling_of(right)
    last = left.dim() - 1
    met = [f for f in a.labels if last in varied(f)] + list(b.labels)
    if any(len(varied(f)) != 1 for f in met):
        raise Unsupported
    _meet(call, [vector(f, varied(f)[0]) for f in met], zero=a.zero or b.zero)
    rest = tuple(f.select(last, 0) for f in a.labels if last not in varied(f))
    return Labelling(rest, Kind.WEIGHT if a.kind is b.kind is Kind.WEIGHT else Kind.DATA, bool(rest) and a.zero)


def distances(call: Call) -> Result:
    """`cdist`: differences along the last axis, 0 where both are."""
    a, b = map(labelling_of, call.args[:2])
    lines = []
    for tensor in call.args[:2]:
        for label in labelling_of(tensor).labels:
            if varied(label) == (tensor.dim() - 1,):
                lines.append(vector(label, tensor.dim() - 1))
            else:
                call.constraints.freeze(label)
    _meet(call, lines, zero=a.zero and b.zero)
    return NOTHING


def _meet(call: Call, lines: list[Tensor], *, zero: bool) -> None:
    """Ties the two lines that are summed over; they stay where one is missing, or what is removed is not 0."""
    for line in lines:
        if len(lines) != 2 or not zero:
            call.constraints.freeze(line)
        call.constraints.tie(lines[0], line)


def _count_matmul(call: Call, a: Labelling, b: Labelling, left: Tensor, right: Tensor) -> None:
    batch = left.dim() - 2
    total = left.numel() * right.shape[-1]
    dims = {
        "n": left.shape[-2],
        "k": left.shape[-1],
        "m": right.shape[-1],
        "b": math.prod(left.shape[:batch]),
    }
    names_a = ["b"] * batch + ["n", "k"]
    names_b = ["b"] * batch + ["k", "m"]
    factors: list[Tensor] = []
    covered: set[str] = set()
    spans = [({names[x] for x in varied(f)}, f) for m, names in ((b, names_b), (a, names_a)) for f in m.labels]
    for span, label in sorted(spans, key=lambda item: -len(item[0])):
        if span and not span & covered:
            size = math.prod(dims[name] for name in span)
            values = slim(label).reshape(-1)
            if values.numel() == size:
                factors.append(values)
                covered |= span
    static = total // math.prod(dims[name] for name in covered)
    call.constraints.work.append(Work(call.layer, static, tuple(factors)))


def embedding(call: Call) -> Result:
    """Rows of a table: the vocabulary stays, the features are the table's second axis."""
    table, out = call.args[0], call.out[0] if isinstance(call.out, tuple) else call.out
    labelling = labelling_of(table)
    labels = []
    for label in labelling.labels:
        if 0 in varied(label):
            call.constraints.freeze(label)
        elif 1 in varied(label):
            call.constraints.producers.append(vector(label, 1).numpy())
            labels.append(along(vector(label, 1), out.dim() - 1, out.shape))
    result = Labelling(tuple(labels), Kind.DATA, labelling.zero)
    return (result, *[ASIDE] * (len(call.out) - 1)) if isinstance(call.out, tuple) else result
