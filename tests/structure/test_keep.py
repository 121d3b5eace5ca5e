"""Which units stay: the exact number of the lowest, ties by index, and none left empty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prune_cli.errors import SurgeryError
from prune_cli.structure import surgery
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import lowest_units, removed
from tests.structure.networks import NETWORKS, example, randomise


def test_a_part_of_a_family_is_never_left_without_channels() -> None:
    build, shape, _ = NETWORKS["unequal parts"]
    model = randomise(build())
    plan = analyse(model, example(*shape))
    keep = lowest_units(plan, np.arange(plan.size, dtype=float), 0.75)  # the lowest come first: all of the first part
    small = surgery.remove_units(model, plan, keep).model
    assert small.a.out_channels >= 1 and small(example(*shape)).shape == (1, 4, 4, 4)


@given(st.integers(1, 300), st.integers(0, 100))
def test_ratio_is_exact(n: int, percent: int) -> None:
    assert removed(percent / 100, n) == percent * n // 100


def test_ratio_outside_the_unit_interval_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"fraction removed"):
        removed(1.5, 10)


def test_select_is_stable_and_leaves_one_unit() -> None:
    plan = analyse(randomise(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5))), example(2, 3))
    keep = lowest_units(plan, np.zeros(plan.size), 0.5)
    assert keep[plan.families[0].units].tolist() == [False] * 4 + [True] * 4
    assert lowest_units(plan, None, 1.0)[plan.families[0].units].sum() == 1
    assert lowest_units(plan, None, {"0": 0.25})[plan.families[0].units].sum() == 6
    with pytest.raises(SurgeryError, match="one score per unit"):
        lowest_units(plan, np.zeros(3), 0.5)
