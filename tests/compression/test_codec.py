"""Weight sharing, gap and Huffman coding: against scikit-learn, autograd and by-hand numbers; decode inverts encode."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from prune_cli.compression import codec, huffman, kmeans
from prune_cli.compression.gaps import fillers
from prune_cli.compression.kmeans import Clustered


def sparse(seed: int, *shape: int, density: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.rand(*shape, generator=generator) < density


def test_centroid_gradient_is_that_of_autograd():
    weight, keep = sparse(5, 12, 7)
    shared = kmeans.cluster(weight.double(), keep, 5)
    codebook = shared.codebook.clone().requires_grad_()
    full = torch.where(keep, codebook[shared.assignment.clamp_min(0)], 0)
    full.retain_grad()
    ((full @ torch.ones(7).double()).sin().sum() + full.pow(3).sum()).backward()
    assert torch.allclose(kmeans.centroid_gradient(full.grad, shared.assignment, 5), codebook.grad)


# ------------------------------------------------------------------------------------------------ Huffman


def brute_force_mean(counts: list[int]) -> float:
    """The least mean length over all code lengths that Kraft's inequality allows."""
    best = float("inf")
    for lengths in itertools.product(range(1, len(counts)), repeat=len(counts)):
        if sum(2.0**-size for size in lengths) <= 1:
            best = min(best, sum(c * size for c, size in zip(counts, lengths, strict=True)) / sum(counts))
    return best


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
