"""Bytes of formats by hand-computed numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.compression import gaps
from prune_cli.granularities.n_m import nm_mask
from prune_cli.measure import storage
from prune_cli.measure.storage import MaskFormat


def test_dense_and_filters():
    assert storage.dense((4, 3, 3, 3)).total == 4 * 27 * 4
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    mask[0], mask[:, 1] = False, False
    cost = storage.filters(mask, (4, 3, 3, 3))
    assert (cost.values, cost.bitmaps) == (3 * 2 * 9 * 4, 1)


def test_fillers_cover_every_zero_that_codes_do_not():
    mask = torch.zeros(50, dtype=torch.bool)
    mask[[3, 20, 21]] = True
    # runs of 3, 16, 0 and 28 zeros; a filler of 2 bits covers 4, of 4 bits 16
    assert gaps.fillers(mask, 2) == 0 + 4 + 0 + 7
    assert gaps.fillers(mask, 4) == 0 + 1 + 0 + 1
    assert gaps.fillers(torch.zeros(16, dtype=torch.bool), 4) == 1
    assert gaps.fillers(torch.ones(5, dtype=torch.bool), 4) == 0


def test_single_weights_take_the_cheapest_indices():
    full = torch.ones(100, 10, dtype=torch.bool)
    assert storage.element(full, full.shape) == storage.Storage(4000, bitmaps=125)
    sparse = torch.zeros(100, 100, dtype=torch.bool)
    sparse[:, 0] = True  # runs of 99 zeros: 8 bits need no filler, and one bit each is dearer
    assert storage.element(sparse, sparse.shape) == storage.Storage(400, indices=100)


# ------------------------------------------------------------------------------------------------ which format


def random_mask(seed: int, *shape: int, density: float) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


N_M = MaskFormat("n_m", {"m": 4, "n": 2, "axis": 1})


def test_a_mask_is_stored_in_its_form_while_it_has_it():
    keep = nm_mask(torch.randn(8, 16, 3, 3), 4, 2)
    name, cost = storage.stored(N_M, keep, keep.shape)
    assert (name, cost.values, cost.indices, cost.total) == ("n_m", 8 * 8 * 9 * 4, 8 * 8 * 9 * 2 // 8, 2448)
    across = keep[:, [0, 1, 4, 5, 8, 9, 12, 13]]  # half the input channels gone: groups of four are other channels now
    assert bool((across.view(8, 2, 4, 3, 3).sum(2) > 2).any())
    name, cost = storage.stored(N_M, across, across.shape)
    assert (name, cost) == ("element", storage.element(across, across.shape))
    # Transposed weights have their input channels in front.
    turned = keep.transpose(0, 1)
    assert storage.stored(MaskFormat("n_m", {"m": 4, "n": 2, "axis": 0}), turned, turned.shape)[0] == "n_m"


def test_zeros_inside_a_form_are_stored_as_values_only_where_that_is_less():
    dead = nm_mask(torch.randn(8, 16), 4, 2)
    dead[0] = False  # 8 of 128 weights fewer than 2:4 holds: dearer than bits that say so
    assert storage.stored(N_M, dead, dead.shape) == ("element", storage.element(dead, dead.shape))
    one = nm_mask(torch.randn(64, 64), 8, 1)
    one[0, 0:8] = False  # here the format's 3 bits per weight are less than any other index
    name, cost = storage.stored(MaskFormat("n_m", {"m": 8, "n": 1, "axis": 1}), one, one.shape)
    assert (name, cost.values, cost.indices) == ("n_m", 64 * 8 * 4, 64 * 8 * 3 // 8)
    stripes = torch.ones(8, 16, 3, 3, dtype=torch.bool)
    stripes[:, :, 0] = False
    inside = stripes & random_mask(1, *stripes.shape, density=0.5)
    assert storage.stored(MaskFormat("stripe"), stripes, stripes.shape)[0] == "stripe"
    assert storage.stored(MaskFormat("stripe"), inside, inside.shape)[0] == "element"


def test_filters_that_were_masked_across_cost_their_zeros_or_less():
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    mask[1], mask[:, 2] = False, False
    assert storage.stored(MaskFormat("filters"), mask, mask.shape) == (
        "filters",
        storage.Storage(5 * 3 * 9 * 4, bitmaps=2),
    )
    mask[0, 0, 0, 0] = False
    name, cost = storage.stored(MaskFormat("filters"), mask, mask.shape)
    assert (name, cost.total) == ("filters", 542)  # one zero as a value is less than 216 bits
    norm = torch.tensor([True] * 5 + [False] * 27)
    assert storage.stored(MaskFormat("filters"), norm, norm.shape) == ("filters", storage.Storage(20, bitmaps=4))


def test_patterns_hold_parts_of_themselves_but_no_others():
    form = MaskFormat("pattern", {"entries": 4, "library": 2})
    mask = torch.zeros(4, 8, 3, 3, dtype=torch.bool)
    kernels = mask.view(32, 9)
    kernels[:10, [0, 1, 3, 4]] = True
    kernels[10:20, [4, 5, 7, 8]] = True
    name, cost = storage.stored(form, mask, mask.shape)
    assert (name, cost.values, cost.indices, cost.bitmaps, cost.codebooks) == ("pattern", 20 * 16, 3, 4, 3)
    kernels[0, 0] = False  # 3 of the pattern's 4
    assert storage.stored(form, mask, mask.shape)[0] == "pattern"
    kernels[20, [2, 4]] = True  # in neither
    assert storage.stored(form, mask, mask.shape)[0] == "element"
    kernels[20] = kernels[0] | kernels[10]  # five and more entries
    assert storage.stored(form, mask, mask.shape)[0] == "element"
    kernels[20] = False
    kernels[20, [0, 2, 4, 6]] = True  # a third pattern
    assert storage.stored(form, mask, mask.shape)[0] == "element"


@pytest.mark.parametrize("form", [MaskFormat(), N_M, MaskFormat("filters")])
def test_what_removes_next_to_nothing_is_dense(form):
    mask = torch.ones(16, 16, dtype=torch.bool)
    assert storage.stored(form, mask, mask.shape, bits=16) == ("dense", storage.Storage(512))
    mask[0, 0] = False
    assert storage.stored(form, mask, mask.shape)[0] == "dense"


@given(st.integers(0, 10**6), st.sampled_from(sorted(storage.FORMATS)), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_values_cover_what_is_kept_and_zeros_among_them_are_never_the_dearer_way(seed, name, density):
    numbers = {"n_m": {"m": 4, "n": 2, "axis": 1}, "pattern": {"entries": 4, "library": 8}}.get(name, {})
    mask = random_mask(seed, 4, 6, 3, 3, density=density)
    _, cost = storage.stored(MaskFormat(name, numbers), mask, mask.shape)
    needed = 4 * int(mask.sum())
    assert needed <= cost.values and cost.total <= 4 * mask.numel()
    if cost.values > needed:
        assert cost.total <= storage.element(mask, mask.shape).total
