"""Kernel patterns: the library, the projection against every other choice, exact numbers of kernels, the ratios."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities import pattern as patterns
from prune_cli.granularities.pattern import Pattern
from prune_cli.measure import storage
from prune_cli.measure.storage import MaskFormat
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule

L1, L2 = Criterion(weights.l1), Criterion(weights.l2)
IMAGE = torch.zeros(1, 3, 12, 12)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 20, 3), nn.Conv2d(20, 4, 1), nn.Flatten(), nn.Linear(256, 10))


def kernels(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, 9, generator=torch.Generator().manual_seed(seed))


def test_there_are_56_candidates_of_four_entries():
    found = patterns.candidates(4)
    assert len(set(found)) == 56
    assert all(4 in pattern and len(pattern) == 4 for pattern in found)
    assert [len(patterns.candidates(e)) for e in (2, 5, 8)] == [8, 70, 8]


def test_library_is_the_most_frequent_natural_patterns():
    scores = kernels(1, 300).square()
    count: Counter[tuple[int, ...]] = Counter()
    for row in scores.tolist():
        others = sorted((p for p in range(9) if p != 4), key=lambda p: row[p])[-3:]
        count[tuple(sorted([4, *others]))] += 1
    order = sorted(patterns.candidates(4), key=lambda pattern: -count[pattern])  # stable: ties by number
    library = patterns.most_frequent([scores.view(20, 15, 3, 3)], 4, 6)
    assert [tuple(torch.nonzero(row).flatten().tolist()) for row in library] == order[:6]


@given(st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_projection_is_nearer_than_every_other_choice_and_idempotent(seed):
    weight = kernels(seed, 6).view(2, 3, 3, 3)
    library = patterns.most_frequent([weight.square()], 4, 4)
    mask = patterns.pattern_mask(weight.square(), library, Fraction(5, 9))
    projected = weight * mask
    distance = float((weight - projected).square().sum())
    for choice in itertools.product(range(4), repeat=6):
        other = weight * library[list(choice)].view(weight.shape)
        assert distance <= float((weight - other).square().sum()) + 1e-5
    again = patterns.pattern_mask(projected.square(), library, Fraction(5, 9))
    assert torch.equal(projected * again, projected)


@pytest.mark.parametrize("ratio", [0.5556, 0.7, 0.75, 0.9])
def test_patterns_and_exact_connectivity(ratio):
    model = network()
    selection = select(Granularity(Pattern(library=6), ratio), L2, model, IMAGE)
    assert sorted(selection.masks) == ["0.weight", "1.weight"]
    used = set()
    q = (Fraction(str(ratio)) - Fraction(5, 9)) / Fraction(4, 9)
    for mask in selection.masks.values():
        rows = mask.view(-1, 9)
        alive = rows[rows.any(1)]
        assert int((~rows.any(1)).sum()) == int(q * len(rows))
        assert (alive.sum(1) == 4).all() and alive[:, 4].all()
        used |= {tuple(row) for row in alive.tolist()}
    assert len(used) <= 6
    assert selection.requested == pytest.approx(ratio)
    assert selection.removed / selection.units == pytest.approx(ratio, abs=0.02)


def test_connectivity_removes_the_kernels_whose_pattern_keeps_least():
    weight = kernels(3, 40).view(8, 5, 3, 3)
    library = patterns.most_frequent([weight.square()], 4, 8)
    whole = patterns.pattern_mask(weight.square(), library, Fraction(5, 9))
    some = patterns.pattern_mask(weight.square(), library, Fraction(5, 9) + Fraction(1, 4) * Fraction(4, 9))
    kept = (weight * whole).flatten(2).norm(dim=2)
    gone = ~some.flatten(2).any(2)
    assert int(gone.sum()) == 10
    assert kept[gone].max() <= kept[~gone].min()


def test_connectivity_ratio_instead_of_the_total():
    masks = select(Granularity(Pattern(connectivity_ratio=0.5), 0.1), L2, network(), IMAGE).masks
    assert [int((~mask.flatten(2).any(2)).sum()) for mask in masks.values()] == [12, 80]


def test_a_total_below_the_patterns_is_refused():
    with pytest.raises(ConfigError, match=r"ratio 0.5 is less than the 0.5556 .*choose a larger ratio"):
        Granularity(Pattern(), 0.5).check(network(), L2)
    Granularity(Pattern(entries=5), 0.5).check(network(), L2)


def test_fixed5_realises_four_ninths_with_a_warning(caplog):
    granularity = Granularity(Pattern("fixed5"), 0.2)
    with caplog.at_level(logging.WARNING):
        granularity.check(network(), L1)
    assert "less than the 0.4444" in caplog.text
    masks = select(granularity, L1, network(), IMAGE).masks
    allowed = {tuple(position in fixed for position in range(9)) for fixed in patterns.FIXED5}
    for mask in masks.values():
        assert {tuple(row) for row in mask.view(-1, 9).tolist()} <= allowed


def test_fixed5_ranks_whole_kernels():
    model = network()
    ratio = 0.7
    mask = select(Granularity(Pattern("fixed5"), ratio), L1, model, IMAGE).masks["1.weight"]
    norms = model[1].weight.detach().abs().flatten(2).sum(2)
    gone = ~mask.flatten(2).any(2)
    assert int(gone.sum()) == int((Fraction("0.7") - Fraction(4, 9)) / Fraction(5, 9) * 160)
    assert norms[gone].max() <= norms[~gone].min()


def test_shares_grow_from_entries_outside_patterns_to_kernels():
    model = network()
    before = torch.ones(20, 8, 3, 3, dtype=torch.bool)
    for share in (0.0, 0.3, 0.6, 0.8, 1.0):
        mask = select(Granularity(Pattern(), 0.75), L2, model, IMAGE, fraction=share).masks["1.weight"]
        goal = Fraction("0.75") * Fraction(str(share))
        if goal < Fraction(5, 9):
            assert int((~mask).sum()) == int(goal * mask.numel())
        assert not (mask & ~before).any()
        before = mask


def test_what_is_masked_stays_masked():
    model = network()
    held = select(Granularity(Pattern(), 0.6), L2, model, IMAGE).masks
    for name, mask in held.items():
        model.get_parameter(name).data.mul_(mask)
    later = select(Granularity(Pattern(), 0.8), L2, model, IMAGE, masked=held).masks
    for name, mask in later.items():
        assert not (mask & ~held[name]).any()
        q = (Fraction("0.8") - Fraction(5, 9)) / Fraction(4, 9)
        rows = mask.view(-1, 9)
        assert int((~rows.any(1)).sum()) == int(q * len(rows))


def test_other_kernels_are_refused_where_they_were_chosen():
    with pytest.raises(ConfigError, match=r"2\.weight .*3x3"):
        Granularity(Pattern(), 0.7, rules=(Rule(types=("Conv2d",)),)).check(network(), L2)
    with pytest.raises(ConfigError, match="the network has none"):
        Granularity(Pattern(), 0.7).check(nn.Sequential(nn.Conv2d(3, 4, 5)), L2)


def test_storage():
    mask = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
    mask.view(64, 9)[:40, :4] = True
    form = Pattern(library=6).forms(nn.Sequential(nn.Conv2d(8, 8, 3)), {})["0.weight"]
    assert form == MaskFormat("pattern", {"entries": 4, "library": 6})
    assert Pattern("fixed5").forms(nn.Conv2d(8, 8, 1), {}) == {}
    name, cost = storage.stored(form, mask, mask.shape, bits=16)
    assert name == "pattern"
    assert (cost.values, cost.indices, cost.bitmaps, cost.codebooks) == (40 * 4 * 2, 40 * 3 // 8, 8, 7)
