"""Weight sharing, gap and Huffman coding: against scikit-learn, autograd and by-hand numbers; decode inverts encode."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from prune_cli.compression import codec, huffman, kmeans
from prune_cli.compression.gaps import fillers, from_gaps, to_gaps
from prune_cli.compression.kmeans import Clustered
from prune_cli.errors import CheckpointError


def sparse(seed: int, *shape: int, density: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.rand(*shape, generator=generator) < density


# ------------------------------------------------------------------------------------------------ sharing


@pytest.mark.parametrize(("seed", "clusters"), [(0, 4), (1, 16), (2, 31)])
def test_kmeans_is_that_of_scikit_learn(seed, clusters):
    values = np.random.default_rng(seed).uniform(-1, 2, 3000) ** 3
    start = np.linspace(values.min(), values.max(), clusters)
    reference = KMeans(clusters, init=start[:, None], n_init=1, tol=0, max_iter=300).fit(values[:, None])
    centroids, numbers = kmeans.kmeans(values, clusters)
    assert np.allclose(centroids, np.sort(reference.cluster_centers_[:, 0]), atol=1e-6)
    assert float(((values - centroids[numbers]) ** 2).sum()) == pytest.approx(reference.inertia_, rel=1e-6)


def test_every_value_gets_its_nearest_centroid_and_every_centroid_is_the_mean_of_its_values():
    values = np.concatenate([np.random.default_rng(3).normal(size=500), [40.0]])  # an outlier leaves clusters empty
    centroids, numbers = kmeans.kmeans(values, 32)
    assert len(centroids) < 32 and set(numbers) == set(range(len(centroids)))
    assert np.array_equal(numbers, np.abs(values[:, None] - centroids).argmin(1))
    assert np.allclose(centroids, [values[numbers == k].mean() for k in range(len(centroids))])
    assert len(kmeans.kmeans(np.array([2.0, 2.0]), 8)[0]) == 1
    assert len(kmeans.kmeans(np.zeros(0), 8)[0]) == 0


def test_sharing_leaves_few_values_and_zeros():
    weight, keep = sparse(4, 20, 6, 3, 3)
    shared = kmeans.cluster(weight, keep, 15)
    assert (shared.weight[~keep] == 0).all()
    assert torch.equal(torch.unique(shared.weight[keep]), shared.codebook)
    assert len(shared.codebook) <= 15
    assert float((shared.weight - weight * keep).abs().max()) < 0.5
    with pytest.raises(CheckpointError, match="not finite"):
        kmeans.cluster(weight / 0, keep, 15)


def test_centroid_gradient_is_that_of_autograd():
    weight, keep = sparse(5, 12, 7)
    shared = kmeans.cluster(weight.double(), keep, 5)
    codebook = shared.codebook.clone().requires_grad_()
    full = torch.where(keep, codebook[shared.assignment.clamp_min(0)], 0)
    full.retain_grad()
    ((full @ torch.ones(7).double()).sin().sum() + full.pow(3).sum()).backward()
    assert torch.allclose(kmeans.centroid_gradient(full.grad, shared.assignment, 5), codebook.grad)


# ------------------------------------------------------------------------------------------------ gaps


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_gaps_return_places_and_fillers_are_counted(flags, bits):
    places = np.flatnonzero(flags)
    codes, filler = to_gaps(places, len(flags), bits)
    assert np.array_equal(from_gaps(codes, len(flags), bits)[~filler], places)
    assert (codes < 1 << bits).all() and (codes[filler] == (1 << bits) - 1).all()
    assert int(filler.sum()) == fillers(torch.tensor(flags, dtype=torch.bool), bits)


def test_gap_codes_that_do_not_cover_the_vector_are_refused():
    for codes, length in ([5, 5], 11), ([0], 20), ([], 9):
        with pytest.raises(CheckpointError, match="gap codes reach"):
            from_gaps(np.array(codes, dtype=np.int64), length, 3)


# ------------------------------------------------------------------------------------------------ Huffman


def brute_force_mean(counts: list[int]) -> float:
    """The least mean length over all code lengths that Kraft's inequality allows."""
    best = float("inf")
    for lengths in itertools.product(range(1, len(counts)), repeat=len(counts)):
        if sum(2.0**-size for size in lengths) <= 1:
            best = min(best, sum(c * size for c, size in zip(counts, lengths, strict=True)) / sum(counts))
    return best


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


# ------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap_bits", [1, 5, 8])
def test_decode_inverts_encode_bit_by_bit(dtype, gap_bits):
    weight, keep = sparse(9, 30, 11, 3, 3, density=0.1)
    shared = kmeans.cluster(weight, keep, 16).weight.to(dtype)
    shared[0, 0, 0, 0], shared[1, 1, 1, 1] = -0.0, float("inf")
    back = codec.decode(codec.encode(shared, gap_bits))
    assert back.dtype == dtype and back.shape == shared.shape
    assert np.array_equal(codec.pattern_of(back), codec.pattern_of(shared))


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 1), (300,)])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_tensors(shape, value):
    tensor = torch.full(shape, value)
    assert torch.equal(codec.decode(codec.encode(tensor, 4)), tensor)


def test_sizes_by_formula():
    weight, keep = sparse(10, 64, 64, density=0.05)
    shared = kmeans.cluster(weight, keep, 15).weight
    coded = codec.encode(shared, 4)
    sizes = codec.sizes(coded)
    stored = int(keep.sum()) + fillers(keep, 4)
    assert fillers(keep, 4) > 0 and len(coded.codebook) == 16
    assert sizes.dense == 64 * 64 * 4
    assert sizes.pruned == -(-stored * (32 + 4) // 8)
    assert sizes.shared == -(-(stored * (4 + 4) + 16 * 32) // 8)
    numbers, gaps = (huffman.unpack(stream, stored) for stream in (coded.values, coded.gaps))
    bound = sum(stored * huffman.entropy(np.bincount(symbols)) for symbols in (numbers, gaps))
    assert sizes.entropy == -(-int(np.ceil(bound)) // 8) + 64 or sizes.entropy == -(-(int(np.ceil(bound)) + 512) // 8)
    overhead = coded.values.lengths.nbytes + coded.gaps.lengths.nbytes + coded.values.segments.nbytes * 2
    assert sizes.entropy <= sizes.huffman <= sizes.entropy + stored * 2 / 8 + overhead + 2
    assert sizes.huffman < sizes.shared < sizes.pruned < sizes.dense


def test_zeros_stay_zero():
    weight, keep = sparse(11, 50, 50)
    shared = Clustered(torch.tensor([-1.0, 2.0]), torch.where(keep, (weight > 0).long(), -1))
    assert torch.equal(codec.decode(codec.encode(shared.weight)) == 0, ~keep)


def test_tensors_without_gaps_have_no_codes_of_gaps():
    weight = kmeans.cluster(sparse(12, 40, 30)[0], torch.ones(40, 30, dtype=torch.bool), 16).weight
    coded = codec.encode(weight, 0)
    assert torch.equal(codec.decode(coded), weight)
    sizes = codec.sizes(coded)
    assert (sizes.indices, sizes.pruned, sizes.shared) == (0, 4800, 40 * 30 * 4 // 8 + 16 * 4)
    assert sizes.huffman < codec.sizes(codec.encode(weight, 8)).huffman
    light = torch.where(sparse(13, 40, 30, density=0.9)[1], weight, 0)  # zeros are values then
    assert torch.equal(codec.decode(codec.encode(light, 0)), light)
