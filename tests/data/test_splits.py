from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.data.splits import (
    balanced,
    check_batch,
    generator,
    held_out_count,
    hold_out,
    shard_bounds,
    shares,
    steps,
)
from prune_cli.errors import ConfigError


@st.composite
def labels_and_count(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    labels = np.array(draw(st.lists(st.integers(0, 5), min_size=2, max_size=80)))
    return labels, draw(st.integers(0, len(labels) - 1))


@settings(max_examples=150, deadline=None)
@given(labels_and_count(), st.integers(-3, 3))
def test_hold_out_is_a_stratified_partition(case: tuple[np.ndarray, int], seed: int) -> None:
    labels, count = case
    kept, held = hold_out(labels, count, seed)
    assert len(held) == count
    assert sorted([*kept, *held]) == list(range(len(labels)))
    again = hold_out(labels, count, seed)
    assert np.array_equal(again[0], kept) and np.array_equal(again[1], held)
    sizes = np.bincount(labels)
    if count <= (np.maximum(sizes - 1, 0)).sum():
        # No class is used up while another one can give.
        assert np.all(np.bincount(labels[kept], minlength=len(sizes))[sizes > 0] >= 1)


def test_shares_by_hand() -> None:
    # 7 of (6, 3, 1): exactly 4.2, 2.1 and 0.7; the last class keeps its only image, so the first one gives.
    assert shares(np.array([6, 3, 1]), 7).tolist() == [5, 2, 0]
    assert shares(np.array([50, 50]), 5).tolist() == [3, 2]
    assert shares(np.array([1, 1, 1]), 2).tolist() == [1, 1, 0]


def test_shares_are_within_one_of_exact_when_classes_are_large() -> None:
    sizes = np.array([700, 450, 333, 120])
    for count in (1, 10, 99, 800):
        got = shares(sizes, count)
        assert got.sum() == count
        assert np.all(np.abs(got - sizes * count / sizes.sum()) < 1)


def test_seed_changes_the_choice() -> None:
    labels = np.arange(200) % 4
    assert not np.array_equal(hold_out(labels, 40, 0)[1], hold_out(labels, 40, 1)[1])


def test_held_out_count_takes_fractions_exactly_and_counts() -> None:
    assert held_out_count(0.57, 100, "val") == 57  # floor(0.57 * 100) in floats is 56
    assert held_out_count(0, 10, "val") == 0
    assert held_out_count(5000, 50_000, "val") == 5000


@pytest.mark.parametrize("amount", [-0.1, 2.5, float("nan"), 10, 11])
def test_held_out_count_refuses(amount: float) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.val="):
        held_out_count(amount, 10, "dataset.val")


@settings(max_examples=100, deadline=None)
@given(labels_and_count())
def test_every_prefix_of_balanced_is_balanced(case: tuple[np.ndarray, int]) -> None:
    labels, count = case
    chosen = balanced(labels, count, 0)
    assert len(set(chosen.tolist())) == len(chosen) == count
    assert np.array_equal(chosen, balanced(labels, len(labels), 0)[:count])
    taken, sizes = np.bincount(labels[chosen], minlength=6), np.bincount(labels, minlength=6)
    for a in range(6):
        for b in range(6):
            # a class is ahead by more than one only of a class that has no image left
            assert taken[a] <= taken[b] + 1 or taken[b] == sizes[b]


def test_balanced_gives_all_when_asked_for_more() -> None:
    assert sorted(balanced(np.array([0, 1, 1]), 9, 0)) == [0, 1, 2]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 5))
def test_shards_tile_every_batch(total: int, batch_size: int, world: int) -> None:
    places = []
    for step in range(steps(total, batch_size, None)):
        parts = [shard_bounds(step, batch_size, total, (rank, world)) for rank in range(world)]
        assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1
        places += [place for a, b in parts for place in range(a, b)]
    assert places == list(range(total))


def test_steps_count_the_last_smaller_batch_and_the_limit() -> None:
    assert steps(50_000, 128, None) == 391
    assert steps(100, 50, None) == 2
    assert steps(100, 30, 2) == 2
    assert steps(100, 30, 9) == 4


def test_check_batch_refuses_empty_parts() -> None:
    check_batch(32, 97, (0, 1))
    with pytest.raises(ConfigError, match="a batch of 1 of 97 images"):
        check_batch(32, 97, (0, 2))
    with pytest.raises(ConfigError, match="batch_size=0"):
        check_batch(0, 97, (0, 1))
    with pytest.raises(ConfigError, match="rank"):
        check_batch(8, 97, (2, 2))


def test_generator_depends_on_the_whole_key() -> None:
    draws = {tuple(generator(*key).integers(0, 2**31, 4)) for key in [(1, 2), (2, 1), (12,), ("1", 2), (1, -2)]}
    assert len(draws) == 5
    assert generator("a", 1).integers(0, 2**31) == generator("a", 1).integers(0, 2**31)
