"""Deep Compression behind a mask: weight sharing, gap coding and Huffman coding (Han et al., arXiv:1510.00149).

`share` replaces the weights of a layer by a few centroids, which `sharing.py` fine-tunes, and `encode` / `decode` turn
a tensor with few distinct values into bits and back, bit by bit the same. `compressed.py` makes files.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_cli.errors import CheckpointError

Array = np.ndarray[Any, Any]

SEGMENT = 1024
"""Symbols between two recorded positions in a stream of codes; segments decode side by side."""

LONGEST = 57
"""Bits of the longest code: what one read of 64 bits holds at any bit offset. Fewer than 1e12 symbols need no more."""

BITS_OF = {torch.float64: np.uint64, torch.float32: np.uint32, torch.float16: np.uint16, torch.bfloat16: np.uint16}
SIGNED = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


# ---------------------------------------------------------------------------------------------- weight sharing


@dataclass(frozen=True)
class Shared:
    """A weight whose kept entries take few values.

    Attributes:
        codebook: (k,) centroids, increasing, in the weight's type.
        assignment: int64, shaped like the weight: number of the centroid, -1 where the weight is removed.
    """

    codebook: Tensor
    assignment: Tensor

    @property
    def weight(self) -> Tensor:
        """The shared weight: w = codebook[assignment], zero where removed."""
        return torch.where(self.assignment >= 0, self.codebook[self.assignment.clamp_min(0)], 0)


def share(weight: Tensor, keep: Tensor, clusters: int) -> Shared:
    """Clusters the kept weights of a layer by k-means from linearly spaced centroids (section 3).

    Args:
        weight: any shape.
        keep: bool, broadcastable to the weight; the others become zero.
        clusters: at most this many values, at least 1.

    Raises:
        CheckpointError: a kept weight is not finite.
    """
    kept = keep.expand(weight.shape)
    values = weight.detach()[kept].double().cpu().numpy()
    if not np.isfinite(values).all():
        raise CheckpointError("weights that are not finite can't be clustered")
    centroids, numbers = kmeans(values, clusters)
    assignment = torch.full(weight.shape, -1, dtype=torch.int64, device=weight.device)
    assignment[kept] = torch.from_numpy(numbers).to(weight.device)
    return Shared(torch.from_numpy(centroids).to(weight.device, weight.dtype), assignment)


def kmeans(values: Array, clusters: int, iterations: int = 300) -> tuple[Array, Array]:
    """Lloyd's algorithm on numbers, from centroids spaced evenly between the smallest and the largest.

    On sorted numbers a cluster is a range and its mean a difference of prefix sums, so a step costs O(k log n): the
    same result as scikit-learn's KMeans(init=those centroids, n_init=1), without comparing all with all.
    Clusters that stay empty are dropped.

    Args:
        values: (n,) finite.
        clusters: at least 1.

    Returns:
        Centroids (k,), increasing, and the number of the nearest one for each value.
    """
    if not len(values):
        return np.zeros(0), np.zeros(0, np.int64)
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], clusters)
    borders: Array | None = None
    for _ in range(iterations):
        cuts = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, side="right")
        if borders is not None and np.array_equal(cuts, borders):
            break
        borders = cuts
        ends = np.concatenate([[0], cuts, [len(ordered)]])
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        centroids = np.maximum.accumulate(np.where(counts > 0, means, centroids))
    numbers = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values, side="left")
    used, numbers = np.unique(numbers, return_inverse=True)
    return centroids[used], numbers.reshape(-1).astype(np.int64)


def centroid_gradient(gradient: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """dL/dc_k = sum of dL/dw over the members of cluster k (section 3.3).

    Args:
        gradient: dL/dw.
        assignment: see `Shared`.
        clusters: length of the codebook.
    """
    members = assignment >= 0
    total = torch.zeros(clusters, dtype=gradient.dtype, device=gradient.device)
    return total.index_add_(0, assignment[members], gradient[members])


# ---------------------------------------------------------------------------------------------- gaps


def to_gaps(places: Array, length: int, bits: int) -> tuple[Array, Array]:
    """Relative positions in codes of `bits` bits (section 2).

    A code counts the zeros before an entry. A longer run of zeros is cut by fillers: entries of value zero with the
    largest code, each covering 2 ** bits zeros, behind the last entry too, so codes determine the length.

    Args:
        places: increasing positions of the entries.
        length: of the whole vector.

    Returns:
        Codes, and a bool array that is True at fillers.
    """
    runs = np.diff(np.concatenate([[-1], places, [length]])) - 1
    fillers = runs >> bits
    ends = np.cumsum(fillers + 1) - 1  # the last one is no entry
    codes = np.full(int(ends[-1]), (1 << bits) - 1, dtype=np.int64)
    filler = np.ones(len(codes), dtype=bool)
    codes[ends[:-1]] = runs[:-1] & ((1 << bits) - 1)
    filler[ends[:-1]] = False
    return codes, filler


def from_gaps(codes: Array, length: int, bits: int) -> Array:
    """Positions of the entries and fillers.

    Raises:
        CheckpointError: The codes do not cover a vector of this length.
    """
    places = np.cumsum(codes + 1) - 1
    last = int(places[-1]) if len(places) else -1
    if last >= length or length - 1 - last >= 1 << bits:
        raise CheckpointError(f"gap codes reach position {last} of {length}; the file is damaged")
    return places


# ---------------------------------------------------------------------------------------------- Huffman


def code_lengths(counts: Array) -> Array:
    """Bits per symbol of an optimal prefix code (Huffman); 0 for symbols that do not occur.

    A single symbol has one bit.
    """
    lengths = np.zeros(len(counts), dtype=np.uint8)
    heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts.tolist()) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        low, first, left = heapq.heappop(heap)
        high, second, right = heapq.heappop(heap)
        lengths[left] += 1
        lengths[right] += 1
        heapq.heappush(heap, (low + high, min(first, second), left + right))
    return lengths


def entropy(counts: Array) -> float:
    """Bits per symbol that no code for single symbols can go below."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def _canonical(lengths: Array) -> tuple[Array, Array, Array]:
    """Symbols by (length, number), their codes and lengths.

    Raises:
        CheckpointError: The lengths belong to no prefix code.
    """
    used = np.flatnonzero(lengths)
    symbols = used[np.argsort(lengths[used], kind="stable")]
    sizes = lengths[symbols].astype(np.int64)
    if len(sizes) and sizes[-1] > LONGEST:
        raise CheckpointError(f"a code of {sizes[-1]} bits; at most {LONGEST} are possible")
    codes, code, before = [], 0, 0
    for size in sizes.tolist():
        code <<= size - before
        if code >> size:
            raise CheckpointError("code lengths belong to no prefix code; the file is damaged")
        codes.append(code)
        code, before = code + 1, size
    return symbols, np.array(codes, dtype=np.uint64), sizes


@dataclass(frozen=True)
class Stream:
    """Symbols in a prefix code.

    Attributes:
        lengths: bits per symbol of the alphabet, uint8; the code is canonical, so they determine it.
        segments: bits of every 1024 symbols, uint16.
        data: the codes, end to end, the first bit highest.
    """

    lengths: Array
    segments: Array
    data: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of codes, table and positions."""
        return len(self.data) + self.lengths.nbytes + self.segments.nbytes


NOTHING = Stream(np.zeros(0, np.uint8), np.zeros(0, np.uint16), b"")


def pack(symbols: Array, alphabet: int) -> Stream:
    """Huffman-codes symbols below `alphabet`."""
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    order, codes, sizes = _canonical(lengths)
    code_of, size_of = np.zeros(alphabet, np.uint64), np.zeros(alphabet, np.int64)
    code_of[order], size_of[order] = codes, sizes
    segments = np.add.reduceat(size_of[symbols], np.arange(0, len(symbols), SEGMENT)) if len(symbols) else np.zeros(0)
    pieces, rest = [], np.zeros(0, np.uint8)
    for start in range(0, len(symbols), 1 << 18):
        chunk = symbols[start : start + (1 << 18)]
        bits, wide = code_of[chunk], size_of[chunk]
        ends = np.cumsum(wide)
        drawn = np.zeros(int(ends[-1]), np.uint8)
        for back in range(int(np.max(wide))):  # bit by bit from the end of every code
            here = wide > back
            drawn[ends[here] - 1 - back] = (bits[here] >> np.uint64(back)) & np.uint64(1)
        drawn = np.concatenate([rest, drawn])
        whole = len(drawn) // 8 * 8
        pieces.append(np.packbits(drawn[:whole]).tobytes())
        rest = drawn[whole:]
    pieces.append(np.packbits(rest).tobytes())
    return Stream(lengths, segments.astype(np.uint16), b"".join(pieces))


def unpack(stream: Stream, count: int) -> Array:
    """The symbols of a stream, all segments side by side.

    Args:
        count: how many there are.

    Raises:
        CheckpointError: The stream is damaged. Nothing outside of it is read.
    """
    if not count:
        return np.zeros(0, np.int64)
    order, codes, sizes = _canonical(stream.lengths)
    ends = np.cumsum(stream.segments.astype(np.int64))
    if len(ends) != -(-count // SEGMENT) or not len(order) or not 0 <= 8 * len(stream.data) - ends[-1] < 8:
        raise CheckpointError("a stream of codes has the wrong length; the file is damaged")
    # Codes of one length are consecutive numbers: the last of each length, left-aligned, tells the length of any code.
    starts = np.flatnonzero(np.diff(sizes, prepend=0))
    tails = np.append(starts[1:], len(sizes)) - 1
    spare = (64 - sizes[tails]).astype(np.uint64)
    highest = ((codes[tails] + np.uint64(1)) << spare) - np.uint64(1)  # wraps to all ones where the code is complete
    padded = np.frombuffer(stream.data + bytes(8), np.uint8)
    place = np.concatenate([[0], ends[:-1]])
    found = np.zeros((SEGMENT, len(place)), np.int64)
    lane = np.arange(8)
    for step in range(min(SEGMENT, count)):
        active = len(place) if step < count - (len(place) - 1) * SEGMENT else len(place) - 1
        here = place[:active]
        window = padded[np.minimum(here >> 3, len(padded) - 8)[:, None] + lane].view(">u8")[:, 0].astype(np.uint64)
        window = window << (here & 7).astype(np.uint64)
        which = np.searchsorted(highest, window)
        if which.max() >= len(highest):
            raise CheckpointError("a stream of codes holds a code that does not exist; the file is damaged")
        number = starts[which] + ((window >> spare[which]) - codes[starts[which]]).astype(np.int64)
        found[step, :active] = order[number]
        place[:active] += sizes[starts[which]]
    if not np.array_equal(place, ends):
        raise CheckpointError("the segments of a stream of codes do not end where they should; the file is damaged")
    return found.T.reshape(-1)[:count]


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
        CheckpointError: The codes do not fit the shape.
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
