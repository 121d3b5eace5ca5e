"""What a pruned weight costs to store: bytes of values, indices, bitmaps and codebooks, by formula per format.

Every function takes a mask (True = keep, broadcastable to the weight's shape) and the bits of one value; each part is
rounded up to whole bytes. `coding.py` writes real files with shared weights; these are the formats before that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """Bytes of one stored weight tensor.

    Attributes:
        values: the numbers that stay.
        indices: where they are, one code per value or unit.
        bitmaps: where they are, one bit per position or unit.
        codebooks: tables that codes refer to.
    """

    values: int
    indices: int = 0
    bitmaps: int = 0
    codebooks: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.values + self.indices + self.bitmaps + self.codebooks


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _full(mask: Tensor, shape: Sequence[int]) -> Tensor:
    return mask.bool().expand(tuple(shape))


def code_bits(choices: int) -> int:
    """Bits of a code for one of `choices`; 0 where there is only one."""
    return max(0, math.ceil(math.log2(max(choices, 1))))


def dense(shape: Sequence[int], bits: int = 32) -> Storage:
    """Every value, without indices."""
    return Storage(_bytes(math.prod(shape) * bits))


def fillers(mask: Tensor, gap_bits: int) -> int:
    """Zeros that gap coding must store because a run of zeros is too long for one code of `gap_bits` bits.

    A code counts the zeros before an entry, 0 to 2 ** gap_bits - 1; a filler covers 2 ** gap_bits zeros. Zeros after
    the last entry are covered too, so that the codes determine the length.
    """
    places = torch.nonzero(mask.flatten()).flatten()
    ends = torch.cat(
        [torch.tensor([-1], device=places.device), places, torch.tensor([mask.numel()], device=places.device)]
    )
    return int(((ends[1:] - ends[:-1] - 1) >> gap_bits).sum())


def element(mask: Tensor, shape: Sequence[int], bits: int = 32) -> Storage:
    """Single weights: values with a bitmap, or with gap codes of 4 or 8 bits (arXiv:1510.00149), whichever is less."""
    full = _full(mask, shape)
    kept = int(full.sum())
    options = [Storage(_bytes(kept * bits), bitmaps=_bytes(full.numel()))]
    for gap_bits in (4, 8):
        entries = kept + fillers(full, gap_bits)
        options.append(Storage(_bytes(entries * bits), indices=_bytes(entries * gap_bits)))
    return min(options, key=lambda option: option.total)


def filters(mask: Tensor, shape: Sequence[int], bits: int = 32) -> Storage:
    """Whole rows and columns: a smaller dense tensor, and one bit per output and input channel."""
    full = _full(mask, shape)
    return Storage(_bytes(int(full.sum()) * bits), bitmaps=_bytes(sum(shape[:2])))


def n_m(mask: Tensor, shape: Sequence[int], m: int, n: int, bits: int = 32, axis: int = 1) -> Storage:
    """N:M: n values and n codes of log2(m) bits per group of m along `axis`, also where some of the n are masked.

    The last group may be smaller than m and stores at most as many values as it has.
    """
    length = shape[axis]
    lines = math.prod(shape) // length
    whole, rest = divmod(length, m)
    kept = lines * (whole * n + min(rest, n))
    return Storage(_bytes(kept * bits), indices=_bytes(kept * code_bits(m)))


def stripe(mask: Tensor, shape: Sequence[int], bits: int = 32) -> Storage:
    """Stripes W[n, :, i, j]: C values per kept stripe and one bit per stripe."""
    full = _full(mask, shape)
    kept = int(full.any(1).sum())
    return Storage(_bytes(kept * shape[1] * bits), bitmaps=_bytes(math.prod(shape) // shape[1]))


def kernel(mask: Tensor, shape: Sequence[int], bits: int = 32) -> Storage:
    """Kernels W[n, c]: all their values and one bit per kernel."""
    full = _full(mask, shape)
    kept = int(full.flatten(2).any(2).sum())
    return Storage(_bytes(kept * math.prod(shape[2:]) * bits), bitmaps=_bytes(shape[0] * shape[1]))


def pattern(mask: Tensor, shape: Sequence[int], entries: int, library: int, bits: int = 32) -> Storage:
    """Patterned kernels (PatDNN): `entries` values and a pattern number per kept kernel, a bit per kernel, the library.

    Args:
        entries: values per pattern.
        library: number of patterns; its codebook is one bit per pattern and position.
    """
    full = _full(mask, shape)
    kept = int(full.flatten(2).any(2).sum())
    return Storage(
        _bytes(kept * entries * bits),
        indices=_bytes(kept * code_bits(library)),
        bitmaps=_bytes(shape[0] * shape[1]),
        codebooks=_bytes(library * math.prod(shape[2:])),
    )
