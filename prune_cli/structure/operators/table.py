"""Which rule belongs to which ATen operator; factories and writes into memory.

An operator without a rule freezes every label that touches it: the fallback is less pruning, never a wrong network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from prune_cli.structure.labels import (
    ANY,
    FIXED,
    NOTHING,
    Kind,
    Labelling,
    Work,
    along,
    compact,
    labelling_of,
    varied,
    vector,
    without_labels,
)
from prune_cli.structure.operators.call import Call, Result, Unsupported, extent, freeze, merge
from prune_cli.structure.operators.contractions import (
    bilinear,
    convolution,
    distances,
    embedding,
    grouped_matmul,
    matmul,
    vector_product,
)
from prune_cli.structure.operators.mixing import (
    batch_norm,
    fourier,
    glu,
    grid_sample,
    group_norm,
    layer_norm,
    mixing,
    per_channel,
    pointwise,
    prelu,
    reduction,
    same,
    weight_norm,
)
from prune_cli.structure.operators.movement import (
    cat,
    channel_shuffle,
    flip,
    fold,
    index,
    moved,
    pad,
    pixel_shuffle,
    pixel_unshuffle,
    repeat,
    reshape,
    roll,
    select_op,
    slices,
    split,
    windows,
)
from prune_cli.structure.operators.scattering import gather, pack, scatter, unpack


def factory(call: Call) -> Result:
    """Constants made from a shape fit any width; sequences of numbers do not."""
    if call.name in ("arange", "linspace", "eye", "tril_indices", "triu_indices", "scalar_tensor"):
        return NOTHING
    return Labelling(kind=Kind.UNIFORM, zero=call.name in ("zeros", "zeros_like", "new_zeros"))


def write(call: Call) -> Result:
    """`copy_`, `fill_` and `zero_`, also into a view of a larger tensor."""
    target = call.args[0]
    labelling = labelling_of(target)
    if call.name == "zero" or (call.name == "fill" and labelling.labels):
        return labelling if call.name == "zero" else replace(labelling, zero=False)
    base = target._base
    if call.name != "copy":
        if labelling.kind is Kind.UNIFORM and base is not None:
            freeze(call, base)
            base._prune_labelling = NOTHING  # type: ignore[attr-defined]
            return NOTHING
        return labelling
    source = call.args[1]
    origin = labelling_of(source)
    labels = merge(call, target.shape, [(labelling, target.shape), (origin, extent(source))])
    if base is not None and labels and not labelling.labels:
        _write_base(call, base, target, labels, origin.zero)
    return Labelling(
        labels, Kind.DATA if labels else origin.kind, origin.zero and (labelling.zero or not labelling.labels)
    )


def index_put(call: Call) -> Result:
    """`x[rows] = values`: what the rows and the values are along the axes that are not indexed must be the same."""
    target, indices, values = call.args[:3]
    if target._base is not None or any(index is None for index in indices):
        freeze(call, target._base)
        raise Unsupported
    first = sum(index.dim() if index.dtype in (torch.bool, torch.uint8) else 1 for index in indices)
    shape = call.out.shape[first:]
    operands = []
    for tensor in (target, values):
        labelling, trailing = labelling_of(tensor), min(len(shape), tensor.dim())
        lead = tensor.dim() - trailing
        if any(axis < lead for label in labelling.labels for axis in varied(label)):
            raise Unsupported
        labels = tuple(f.as_strided(f.shape[lead:], f.stride()[lead:], f.storage_offset()) for f in labelling.labels)
        operands.append((replace(labelling, labels=labels), tensor.shape[lead:]))
    labels = tuple(label.expand(call.out.shape) for label in merge(call, shape, operands))
    freeze(call, list(indices))
    return Labelling(labels, Kind.DATA, all(labelling.zero for labelling, _ in operands))


def _write_base(call: Call, base: Tensor, view: Tensor, labels: tuple[Tensor, ...], zero: bool) -> None:
    known = labelling_of(base)
    zero = zero and known.zero
    if known.kind is Kind.UNIFORM and not known.labels and (whole := _spread(base, view, labels)) is not None:
        base._prune_labelling = Labelling(whole, known.kind, zero)  # type: ignore[attr-defined]
        return
    if len(labels) > 1 or len(known.labels) > 1 or not base.is_contiguous():
        for label in (*labels, *known.labels):
            call.constraints.freeze(label)
        return
    empty = ANY if known.kind is Kind.UNIFORM else FIXED
    label = known.labels[0].contiguous() if known.labels else torch.full(base.shape, empty, dtype=torch.int64)
    place = label.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset())
    place.copy_(labels[0])
    base._prune_labelling = Labelling((compact(label),), known.kind, zero)  # type: ignore[attr-defined]


def _spread(base: Tensor, view: Tensor, labels: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The labels of a constant of which a part is written: all of it has them where the part has the whole of their axes,
    as when steps of a sequence are written one after another. None where the part has less."""
    places = {
        (n, stride): axis for axis, (n, stride) in enumerate(zip(base.shape, base.stride(), strict=True)) if n > 1
    }
    whole = []
    for label in labels:
        axes = [places.get((view.shape[axis], view.stride(axis))) for axis in varied(label)]
        if len(axes) != 1 or axes[0] is None:
            return None
        whole.append(along(vector(label, varied(label)[0]), axes[0], base.shape))
    return tuple(whole)


def constant(call: Call) -> Result:
    """Queries whose output carries no channels."""
    return NOTHING


def strided(call: Call) -> Result:
    """`as_strided` that only renames memory: same sizes."""
    source = call.args[0]
    if labelling_of(source).labels and tuple(call.args[1]) != labelling_of(source).labels[0].shape:
        raise Unsupported
    return labelling_of(source)


RULES: dict[str, Callable[[Call], Result]] = {
    **dict.fromkeys(["permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "movedim"], moved),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "_reshape_alias"], reshape),
    **dict.fromkeys(
        [
            "clone",
            "contiguous",
            "_to_copy",
            "alias",
            "detach",
            "lift_fresh",
            "_conj",
            "dropout",
            "lift_fresh_copy",
            "native_dropout",
        ],
        same,
    ),
    "flip": flip,
    "repeat": repeat,
    "roll": roll,
    "slice": slices,
    "cat": cat,
    "stack": cat,
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"], split),
    **dict.fromkeys(["select", "unbind"], select_op),
    "constant_pad_nd": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "im2col": pixel_unshuffle,
    "col2im": fold,
    **dict.fromkeys(["unfold", "view_as_complex", "view_as_real"], windows),
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
    **dict.fromkeys(["index", "index_select"], index),
    "gather": gather,
    **dict.fromkeys(
        [
            "scatter",
            "scatter_add",
            "scatter_reduce",
            "index_add",
            "index_copy",
            "index_fill",
            "index_reduce",
        ],
        scatter,
    ),
    "_pack_padded_sequence": pack,
    "_pad_packed_sequence": unpack,
    **dict.fromkeys(
        [
            "sum",
            "mean",
            "amax",
            "amin",
            "max",
            "min",
            "var",
            "std",
            "var_mean",
            "std_mean",
            "prod",
            "norm",
            "linalg_vector_norm",
            "argmax",
            "argmin",
            "logsumexp",
            "all",
            "any",
            "nansum",
            "median",
        ],
        reduction,
    ),
    **dict.fromkeys(
        ["_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "sort", "topk", "logcumsumexp"],
        mixing,
    ),
    "glu": glu,
    **dict.fromkeys(["grid_sampler_2d", "grid_sampler_3d", "roi_align", "roi_pool"], grid_sample),
    **dict.fromkeys(["_fft_r2c", "_fft_c2c", "_fft_c2r"], fourier),
    "native_batch_norm": batch_norm,
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    "_fused_rms_norm": layer_norm,
    "prelu": prelu,
    "_weight_norm_interface": weight_norm,
    "convolution": convolution,
    **dict.fromkeys(["mm", "addmm", "bmm", "baddbmm"], matmul),
    "_grouped_mm": grouped_matmul,
    "_trilinear": bilinear,
    **dict.fromkeys(["mv", "dot", "vdot"], vector_product),
    **dict.fromkeys(["_cdist_forward", "_euclidean_dist"], distances),
    **dict.fromkeys(["embedding", "_embedding_bag", "_embedding_bag_forward_only"], embedding),
    **dict.fromkeys(["index_put", "_index_put_impl", "_unsafe_index_put"], index_put),
    "copy": write,
    "fill": write,
    "zero": write,
    "as_strided": strided,
    **dict.fromkeys(
        [
            "empty",
            "zeros",
            "ones",
            "full",
            "rand",
            "randn",
            "empty_like",
            "zeros_like",
            "ones_like",
            "full_like",
            "rand_like",
            "randn_like",
            "new_empty",
            "new_zeros",
            "new_ones",
            "new_full",
            "empty_strided",
            "new_empty_strided",
            "arange",
            "linspace",
            "eye",
            "scalar_tensor",
            "tril_indices",
            "triu_indices",
        ],
        factory,
    ),
    **dict.fromkeys(["_local_scalar_dense", "equal", "is_same_size", "nonzero", "randperm", "unique"], constant),
    **dict.fromkeys(
        [
            "bernoulli",
            "uniform",
            "normal",
            "_prelu_kernel",
            "hardswish",
            "hardsigmoid",
            "hardtanh",
            "leaky_relu",
            "elu",
            "celu",
            "softplus",
            "threshold",
            "log_sigmoid",
            "mish",
            "silu",
            "gelu",
            "lerp",
            "addcmul",
            "addcdiv",
            "relu6",
            "selu",
            "rrelu",
            "nan_to_num",
        ],
        pointwise,
    ),
}

PER_CHANNEL = ("pool", "upsample", "reflection_pad", "replication_pad")


@lru_cache(maxsize=4096)
def rule(name: str, func: Any) -> Callable[[Call], Result] | None:
    """The rule of an operator, or None for one that is unknown."""
    found = RULES.get(name)
    if found is None and torch.Tag.pointwise in func.tags:
        return pointwise
    if found is None and any(part in name for part in PER_CHANNEL) and "unpool" not in name and "_backward" not in name:
        return per_channel
    return found


def frozen(call: Call) -> Result:
    """What an unknown operator does: every label that touches it stays."""
    freeze(call, *call.inputs)
    if call.name == "convolution":
        source, weight = call.args[:2]
        spatial = source.shape[2:] if call.args[6] else call.out.shape[2:]
        total = source.shape[0] * math.prod(spatial) * weight.numel()
        call.constraints.work.append(Work(call.layer, total, ()))
    elif call.name in ("mm", "addmm", "bmm", "baddbmm"):
        call.constraints.work.append(Work(call.layer, call.out.numel() * call.args[-1].shape[-2], ()))
    outs = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
    labelling = without_labels(NOTHING)
    return tuple(labelling for _ in outs) if isinstance(call.out, (tuple, list)) else labelling
