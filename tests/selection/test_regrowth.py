"""Units that change places, against loops over sorted lists: as many as before, the weakest for the strongest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_cli.selection.regrowth import moved


def by_hand(kept: list[bool], drop: list[float], grow: list[float], fraction: float) -> list[bool]:
    """One row."""
    alive = sorted((i for i, stays in enumerate(kept) if stays), key=lambda i: (drop[i], i))
    count = math.floor(fraction * len(alive))
    survivors = set(alive[count:])
    masked = sorted((i for i in range(len(kept)) if i not in survivors), key=lambda i: (-grow[i], i))
    return [i in survivors or i in masked[:count] for i in range(len(kept))]


UNIT = st.tuples(st.booleans(), st.integers(-3, 3), st.integers(-3, 3))


@given(st.lists(UNIT, min_size=1, max_size=12), st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]))
def test_the_lowest_go_and_as_many_of_the_highest_grow(units, fraction):
    kept, drop, grow = (list(column) for column in zip(*units, strict=True))
    found = moved(torch.tensor(kept), torch.tensor(drop).float(), torch.tensor(grow).float(), fraction)
    assert found.tolist() == by_hand(kept, drop, grow, fraction)
    assert sum(found.tolist()) == sum(kept)


@given(st.lists(UNIT, min_size=6, max_size=6), st.sampled_from([0.4, 0.5, 1.0]), st.permutations(range(6)))
def test_rows_change_places_inside_themselves(units, fraction, order):
    kept, drop, grow = (list(column) for column in zip(*units, strict=True))
    rows = torch.tensor(order).view(2, 3)
    found = moved(torch.tensor(kept), torch.tensor(drop).float(), torch.tensor(grow).float(), fraction, rows).tolist()
    for row in rows.tolist():
        own = by_hand([kept[i] for i in row], [drop[i] for i in row], [grow[i] for i in row], fraction)
        assert [found[i] for i in row] == own


def test_what_may_never_grow_does_not():
    kept = torch.tensor([True, True, False, False])
    never = torch.tensor([0.0, 0.0, float("-inf"), float("-inf")])
    assert moved(kept, torch.tensor([1.0, 2.0, 0.0, 0.0]), never, 1.0).tolist() == kept.tolist()


@pytest.mark.parametrize("whole", [True, False])
def test_a_group_that_is_full_or_empty_stays_as_it_is(whole):
    kept = torch.full((5,), whole)
    assert moved(kept, torch.rand(5), torch.rand(5), 0.7).tolist() == kept.tolist()
