"""Deep Compression behind a mask: weight sharing, gap coding and Huffman coding (Han et al., arXiv:1510.00149).

`share` replaces the weights of a layer by a few centroids, which `sharing.py` fine-tunes, and `encode` / `decode` turn
a tensor with few distinct values into bits and back, bit by bit the same. `compressed.py` makes files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prune_cli.compression.gaps import from_gaps, to_gaps
from prune_cli.compression.huffman import NOTHING, Stream, entropy, pack, unpack
from prune_cli.compression.kmeans import Array

BITS_OF = {torch.float64: np.uint64, torch.float32: np.uint32, torch.float16: np.uint16, torch.bfloat16: np.uint16}
SIGNED = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


# ---------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Coded:
    """A tensor of few distinct values in gap and Huffman codes.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        gap_bits: width of a gap code before Huffman coding; 0 = every position is an entry, and there are no gaps.
        codebook: bit patterns of the distinct values, increasing as unsigned numbers; zero where there are fillers.
        entries: stored values, fillers included.
        values: numbers of codebook entries.
        gaps: zeros before each entry.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    gap_bits: int
    codebook: Array
    entries: int
    values: Stream
    gaps: Stream


@dataclass(frozen=True)
class Sizes:
    """Bytes of one tensor after each of the three stages, and the bound of the third.

    Attributes:
        dense: before pruning.
        pruned: values and gap codes of fixed width.
        shared: codes of fixed width for both, and the codebook.
        huffman: what the file holds: both streams with their tables, and the codebook.
        entropy: the third stage if codes reached their entropy and tables were free.
        values: of `huffman`, the codes of the values with their table.
        indices: of `huffman`, the codes of the gaps with their table.
        codebook: of `huffman`, the distinct values.
    """

    dense: int
    pruned: int
    shared: int
    huffman: int
    entropy: int
    values: int
    indices: int
    codebook: int

    @staticmethod
    def uncoded(size: int) -> Sizes:
        """Those of a tensor that is stored as it is in every stage."""
        return Sizes(size, size, size, size, size, size, 0, 0)


def pattern_of(tensor: Tensor) -> Array:
    """The bits of a floating-point tensor, as unsigned integers of its width."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(SIGNED[tensor.dtype]).numpy().view(BITS_OF[tensor.dtype])


def encode(tensor: Tensor, gap_bits: int = 8) -> Coded:
    """Codes a floating-point tensor bit by bit; worth it when it has many zeros and few other values.

    Args:
        gap_bits: 1 to 8; the paper takes 8 for convolutions and 5 for linear layers. 0 for tensors with no zeros, or so
            few that telling where they are costs more than storing them as values.
    """
    bits = pattern_of(tensor)
    places = np.flatnonzero(bits)
    gaps, filler = to_gaps(places, len(bits), gap_bits)
    stored = np.zeros(len(gaps), bits.dtype)
    stored[~filler] = bits[places]
    codebook, numbers = np.unique(stored, return_inverse=True)
    values, gap_stream = pack(numbers.reshape(-1), len(codebook)), pack(gaps, 1 << gap_bits) if gap_bits else NOTHING
    return Coded(tuple(tensor.shape), tensor.dtype, gap_bits, codebook, len(gaps), values, gap_stream)


def decode(coded: Coded) -> Tensor:
    """The inverse of `encode`.

    Raises:
        CheckpointError: the codes do not fit the shape.
    """
    length = int(np.prod(coded.shape, dtype=np.int64))
    gaps = unpack(coded.gaps, coded.entries) if coded.gap_bits else np.zeros(coded.entries, np.int64)
    places = from_gaps(gaps, length, coded.gap_bits)
    bits = np.zeros(length, BITS_OF[coded.dtype])
    numbers = unpack(coded.values, coded.entries)
    if len(numbers):
        bits[places] = coded.codebook[numbers]
    integers = torch.from_numpy(bits.view(bits.dtype.name.removeprefix("u")))
    return integers.view(coded.dtype).view(coded.shape)


def sizes(coded: Coded) -> Sizes:
    """Bytes after each stage (tables 2 to 5 of the paper); a codebook entry costs one weight."""
    width = 8 * coded.codebook.dtype.itemsize
    dense = int(np.prod(coded.shape, dtype=np.int64)) * width
    code = max(1, int(np.ceil(np.log2(max(len(coded.codebook), 1)))))
    book = len(coded.codebook) * width
    counts = [
        np.bincount(unpack(stream, coded.entries), minlength=1)
        if coded.entries and stream is not NOTHING
        else np.ones(1)
        for stream in (coded.values, coded.gaps)
    ]
    bound = coded.entries * sum(entropy(count) for count in counts)
    bits = (
        dense,
        coded.entries * (width + coded.gap_bits),
        coded.entries * (code + coded.gap_bits) + book,
        8 * (coded.values.nbytes + coded.gaps.nbytes) + book,
        int(np.ceil(bound)) + book,
        8 * coded.values.nbytes,
        8 * coded.gaps.nbytes,
        book,
    )
    return Sizes(*(-(-number // 8) for number in bits))
