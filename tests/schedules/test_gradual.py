"""Gradual and soft pruning: their curves by hand, and the requests that they become."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_cli.errors import ScheduleError
from prune_cli.schedules.gradual import gradual
from prune_cli.schedules.requests import Mask, Train
from prune_cli.schedules.schedule import first_request, most_epochs
from prune_cli.schedules.soft import AT_BEND, BEND, _approached, _rate, soft
from tests.schedules.played import play, toy

PROBLEM = toy({"a": 8, "b": 8}, {"a": 1, "b": 1}, 0.5)


def fractions(requests) -> list[float]:
    return [request.fraction for request in requests if isinstance(request, Mask)]


@given(st.integers(1, 30), st.integers(1, 3), st.floats(0, 0.9), st.sampled_from([1.0, 2.0, 3.0]))
def test_what_is_removed_follows_the_equation_and_ends_exactly(updates, every, initial, power):
    schedule = functools.partial(
        gradual, epochs=updates * every, updates=updates, every=every, initial=initial, power=power
    )
    found = fractions(play(schedule, PROBLEM))
    expected = [1 + (initial - 1) * (1 - j / updates) ** power for j in range(0 if initial else 1, updates + 1)]
    assert found == pytest.approx(expected, abs=1e-12) and found[-1] == 1.0
    assert found == sorted(found)


def test_updates_come_when_the_equation_says():
    """t0 = 1, dt = 2, n = 2: at epochs 3 and 5, and with an initial part at epoch 1 too."""
    schedule = functools.partial(gradual, epochs=8, updates=2, every=2, start=1, power=1.0)
    assert play(schedule, PROBLEM) == [Train(3, 8), Mask(0.5), Train(2, 8), Mask(1.0), Train(3, 8)]
    begun = play(functools.partial(schedule, initial=0.5), PROBLEM)
    assert begun == [Train(1, 8), Mask(0.5), Train(2, 8), Mask(0.75), Train(2, 8), Mask(1.0), Train(3, 8)]
    assert most_epochs(schedule) == 8


def test_units_of_time():
    steps = functools.partial(gradual, epochs=2, updates=2, every=7, unit="step", power=1.0, monotone=False)
    assert play(steps, PROBLEM) == [
        Train(total=2, steps=7), Mask(0.5, monotone=False), Train(total=2, steps=7), Mask(1.0, monotone=False),
        Train(total=2, steps=6),
    ]  # fmt: skip
    trainings = functools.partial(gradual, epochs=5, updates=2, every=2, unit="iteration", power=1.0)
    assert play(trainings, PROBLEM) == [Train(2), Mask(0.5), Train(2), Mask(1.0), Train(1)]


def test_updates_spread_over_three_quarters_where_nothing_is_said():
    schedule = functools.partial(gradual, epochs=8, updates=3, start=4, unit="step", power=1.0)  # of 80 steps
    made = play(schedule, PROBLEM)
    assert [one.steps for one in made if isinstance(one, Train)] == [4 + 19, 19, 19, 80 - 4 - 57]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"epochs": 3, "updates": 2, "every": 2}, "comes after 4 epochs, but epochs=3 are 3"),
        ({"epochs": 1, "updates": 2, "every": 6, "unit": "step"}, "comes after 12 steps, but epochs=1 are 10"),
    ],
)
def test_an_end_that_comes_too_late_is_refused_when_it_is_first_asked(keys, message):
    with pytest.raises(ScheduleError, match=message):
        first_request(functools.partial(gradual, **keys), PROBLEM)


def test_soft_masks_follow_every_training_and_only_the_last_is_held():
    schedule = functools.partial(soft, epochs=5, soft_epochs=3, every=2)
    assert play(schedule, PROBLEM) == [
        Train(2, 5, soft=True), Mask(monotone=False, soft=True), Train(1, 5, soft=True), Mask(monotone=False),
        Train(2, 5),
    ]  # fmt: skip
    with pytest.raises(ScheduleError, match="more than epochs=2"):
        first_request(functools.partial(soft, epochs=2, soft_epochs=3), PROBLEM)


@given(st.floats(0, 0.7))
def test_the_asymptotic_curve_goes_through_its_three_points(initial):
    rate = _rate(initial)
    points = [_approached(now, initial, rate) for now in (0, BEND, 1)]
    assert points == pytest.approx([initial, AT_BEND, 1.0], abs=1e-6)
    found = fractions(
        play(functools.partial(soft, epochs=20, soft_epochs=20, asymptotic=True, initial=initial), PROBLEM)
    )
    assert found == sorted(found) and found[-1] == 1.0 and len(found) == 20
