"""Huffman codes: optimal, within a bit of the entropy, and whole again after reading."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.compression import huffman
from prune_cli.errors import CheckpointError
from tests.compression.test_codec import brute_force_mean


@pytest.mark.parametrize("counts", [[5, 2, 1, 1], [1, 1, 1, 1, 1], [8, 4, 2, 1, 1], [3, 3, 2]])
def test_huffman_is_optimal_and_within_a_bit_of_entropy(counts):
    lengths = huffman.code_lengths(np.array(counts))
    mean = sum(c * int(size) for c, size in zip(counts, lengths, strict=True)) / sum(counts)
    assert mean == pytest.approx(brute_force_mean(counts))
    bound = huffman.entropy(np.array(counts))
    assert bound - 1e-12 <= mean < bound + 1


def test_mean_length_near_entropy_by_hand():
    counts = np.array([45, 25, 15, 10, 5])
    mean = float((huffman.code_lengths(counts) * counts).sum() / 100)
    assert mean == pytest.approx(0.45 + 0.25 * 2 + 0.15 * 3 + 0.15 * 4)
    assert huffman.entropy(counts) == pytest.approx(-sum(c / 100 * np.log2(c / 100) for c in counts))


@given(st.integers(0, 5000), st.integers(1, 40), st.integers(0, 99), st.floats(0.3, 6))
@settings(max_examples=50, deadline=None)
def test_streams_come_back(count, alphabet, seed, skew):
    drawn = np.random.default_rng(seed).uniform(size=count) ** skew
    symbols = (drawn * alphabet).astype(np.int64)
    stream = huffman.pack(symbols, alphabet)
    assert np.array_equal(huffman.unpack(stream, count), symbols)
    assert 8 * len(stream.data) - int((stream.lengths.astype(int)[symbols]).sum()) in range(8)


def test_codes_as_long_as_fibonacci_counts_make_them():
    counts = [1, 1]
    while len(counts) < 18:
        counts.append(counts[-1] + counts[-2])
    symbols = np.repeat(np.arange(len(counts)), counts)
    stream = huffman.pack(np.random.default_rng(0).permutation(symbols), len(counts))
    assert stream.lengths.max() == len(counts) - 1
    assert np.array_equal(np.bincount(huffman.unpack(stream, len(symbols))), counts)


def test_damaged_streams_are_refused_or_at_least_stay_inside():
    symbols = np.random.default_rng(1).integers(0, 5, 3000)
    stream = huffman.pack(symbols, 7)
    generator = np.random.default_rng(2)
    caught = 0
    for _ in range(60):
        lengths, segments, data = stream.lengths.copy(), stream.segments.copy(), bytearray(stream.data)
        match generator.integers(3):
            case 0:
                lengths[generator.integers(7)] = generator.integers(256)
            case 1:
                segments[generator.integers(len(segments))] += generator.integers(1, 9)
            case _:
                data[generator.integers(len(data))] ^= int(generator.integers(1, 256))
        try:
            found = huffman.unpack(huffman.Stream(lengths, segments, bytes(data)), 3000)
            assert len(found) == 3000 and found.min() >= 0 and found.max() < 7
        except CheckpointError:
            caught += 1
    assert caught > 20
