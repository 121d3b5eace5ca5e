"""Operators without arithmetic: while labels or shapes are followed, the values of activations matter to nobody.

Not `torch._subclasses.FakeTensorMode`, because it refuses networks that look at a value, which run here on zeros, and its
forward pass takes longer than a real one (ResNet-50 at 64 pixels: 1.3 s, here 0.02 to 0.05 s), while analyses are many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

VIEWS = {"view", "_unsafe_view", "permute", "transpose", "unsqueeze", "squeeze", "clone"}
LIGHT = {
    "relu", "silu", "gelu", "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "tanh", "leaky_relu", "elu",
    "add", "mul", "sub", "div", "native_batch_norm", "native_layer_norm", "_softmax", "_safe_softmax",
}  # fmt: skip
POOLS = {"max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d"}
SHAPED = {"mean", "cat", "clone", *POOLS}
HEAVY = {"convolution", "mm", "addmm", "bmm", "baddbmm"}


KINDS = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}
CHUNK = 1 << 24


class ZeroBlocks:
    """Hands out zeros of which nothing is ever written: parts of large blocks whose pages are not touched."""

    def __init__(self) -> None:
        self.blocks: dict[torch.dtype, tuple[np.ndarray, int]] = {}

    def zeros(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Zeros of a shape, marked as hollow on a CPU."""
        kind = KINDS.get(like.dtype)
        if kind is None or not like.is_cpu:
            return like.new_zeros(tuple(shape))
        size = math.prod(shape)
        block, start = self.blocks.get(like.dtype, (NO_BLOCK, 0))
        if start + size > len(block):
            block, start = np.zeros(max(size, CHUNK), kind), 0
        self.blocks[like.dtype] = block, start + -(-size // 16) * 16
        made = torch.from_numpy(block[start : start + size].reshape(shape))
        made._prune_hollow = True  # type: ignore[attr-defined]
        return made


NO_BLOCK = np.zeros(0, np.float32)


def skipped(pages: ZeroBlocks, name: str, mutable: bool, args: tuple[Any, ...]) -> Any:
    """The output of a light operator on a hollow activation without computing it; None if it must be computed."""
    source = args[0]
    if not isinstance(source, Tensor) or not getattr(source, "_prune_hollow", False) or not source.is_contiguous():
        return None
    if name == "native_batch_norm":
        if args[5] or any(isinstance(a, Tensor) and a.shape != source.shape[1:2] for a in args[1:5]):
            return None
        empty = source.new_empty(0)
        return pages.zeros(source, source.shape), empty, empty
    if name == "native_layer_norm":
        shape = torch.Size(args[1])
        if source.shape[source.dim() - len(shape) :] != shape:
            return None
        if any(isinstance(a, Tensor) and a.shape != shape for a in args[2:4]):
            return None
        stat = source.new_zeros((*source.shape[: source.dim() - len(shape)], *([1] * len(shape))))
        return pages.zeros(source, source.shape), stat, stat.clone()
    for other in args[1:]:
        if isinstance(other, Tensor) and (other.dtype != source.dtype or not other.is_contiguous()):
            return None
    if mutable and len(args) == 1:
        return source
    shapes = [a.shape for a in args if isinstance(a, Tensor)]
    if any(shape != source.shape and not _spreads(shape, source.shape) for shape in shapes):
        return None
    return source if mutable else pages.zeros(source, source.shape)


def _spreads(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a shape broadcasts to the target."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in pairs)


def shaped(pages: ZeroBlocks, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of an operator on hollow activations whose shape is known without it; None if it must be computed."""
    if name == "cat":
        return _cat(pages, *args) if not kwargs else None
    source = args[0]
    if not getattr(source, "_prune_hollow", False):
        return None
    if name == "clone":
        contiguous = kwargs.get("memory_format") is torch.contiguous_format or source.is_contiguous()
        return pages.zeros(source, source.shape) if contiguous else None
    if kwargs or not source.is_contiguous():
        return None
    if name == "mean":
        if len(args) < 2 or not args[1]:
            return None
        dims = {d % source.dim() for d in args[1]}
        keep = len(args) > 2 and args[2]
        return pages.zeros(source, [1 if a in dims else n for a, n in enumerate(source.shape) if keep or a not in dims])
    if source.dim() != 4 or not source.shape[0] or not source.shape[1]:
        return None
    one = func(source[:1, :1], *args[1:])  # one channel says how large the others become
    if isinstance(one, Tensor):
        return pages.zeros(source, (*source.shape[:2], *one.shape[2:]))
    return tuple(pages.zeros(part, (*source.shape[:2], *part.shape[2:])) for part in one)


def _cat(pages: ZeroBlocks, parts: Sequence[Tensor], axis: int = 0) -> Tensor | None:
    first = parts[0]
    if not all(getattr(p, "_prune_hollow", False) and p.dtype == first.dtype and p.is_contiguous() for p in parts):
        return None
    axis %= first.dim()
    rest = (first.shape[:axis], first.shape[axis + 1 :])
    if any((p.shape[:axis], p.shape[axis + 1 :]) != rest for p in parts):
        return None
    return pages.zeros(first, (*rest[0], sum(p.shape[axis] for p in parts), *rest[1]))


def product(pages: ZeroBlocks, name: str, args: tuple[Any, ...]) -> Tensor:
    """The zeros that stand for a convolution or matrix product; refuses shapes that do not fit."""
    if name == "convolution":
        source, weight, bias, stride, padding, dilation, transposed, extra, groups = args
        if bias is not None or source.dim() != weight.dim() or source.dtype != weight.dtype:
            outputs = weight.shape[1] * groups if transposed else weight.shape[0]
            if bias is not None and bias.shape != (outputs,):
                raise RuntimeError(f"bias of shape {tuple(bias.shape)} for {outputs} channels")
        inputs = weight.shape[0] if transposed else weight.shape[1] * groups
        if source.dim() != weight.dim() or source.shape[1] != inputs or weight.shape[0] % groups:
            raise RuntimeError(f"a convolution of {inputs} channels got {tuple(source.shape)}")
        kernel = weight.shape[2:]
        if transposed:
            spatial = [
                (n - 1) * s - 2 * p + d * (k - 1) + e + 1
                for n, s, p, d, k, e in zip(source.shape[2:], stride, padding, dilation, kernel, extra, strict=True)
            ]
            return pages.zeros(source, (source.shape[0], weight.shape[1] * groups, *spatial))
        spatial = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, s, p, d, k in zip(source.shape[2:], stride, padding, dilation, kernel, strict=True)
        ]
        if min(spatial, default=1) < 1:
            raise RuntimeError("kernel size can't be greater than actual input size")
        return pages.zeros(source, (source.shape[0], weight.shape[0], *spatial))
    left, right = args[-2:]
    if left.shape[-1] != right.shape[-2] or left.shape[:-2] != right.shape[:-2]:
        raise RuntimeError(f"a product of {tuple(left.shape)} and {tuple(right.shape)}")
    shape = (*left.shape[:-1], right.shape[-1])
    if len(args) == 3:
        torch.broadcast_shapes(args[0].shape, shape)
        if args[0].dim() > len(shape) or any(
            a not in (1, b) for a, b in zip(reversed(args[0].shape), reversed(shape), strict=False)
        ):
            raise RuntimeError(f"a bias of shape {tuple(args[0].shape)} for {shape}")
    return pages.zeros(left, shape)
