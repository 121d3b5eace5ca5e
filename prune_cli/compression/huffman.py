"""Canonical Huffman codes of arrays, in segments that decode in parallel."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from prune_cli.compression.kmeans import Array
from prune_cli.errors import CheckpointError

SEGMENT = 1024
"""Symbols between two recorded positions in a stream of codes; segments decode side by side."""

LONGEST = 57
"""Bits of the longest code: what one read of 64 bits holds at any bit offset. Fewer than 1e12 symbols need no more."""


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
        CheckpointError: the lengths belong to no prefix code.
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
        CheckpointError: the stream is damaged. Nothing outside of it is read.
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
