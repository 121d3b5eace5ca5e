"""Schedules as the sequences of requests that they make."""

from __future__ import annotations

import functools

import pytest

from prune_cli.errors import ConfigError
from prune_cli.schedules.admm import admm
from prune_cli.schedules.iterative import iterative
from prune_cli.schedules.one_shot import one_shot
from prune_cli.schedules.problem import Arithmetic, Problem
from prune_cli.schedules.requests import Mask, Project, Train
from prune_cli.schedules.schedule import first_request, most_epochs, trains, trains_first

NOTHING = Problem((), "units", 0, Arithmetic((), (), (), (), (), (), {}), True, False, ("init",), 0, 10, "layer")
SOFT = Mask(monotone=False, soft=True)


def requests(schedule):
    return list(schedule(NOTHING))


def test_one_shot():
    assert requests(one_shot) == [Mask()]
    assert not trains(one_shot)


def test_iterative_masks_at_every_fifth_soft_epoch_and_once_more_before_the_hard_phase():
    schedule = functools.partial(iterative, epochs=100, retrain_epoch=50, prune_freq=5)
    made = requests(schedule)
    assert made == [SOFT, Train(5, 100, soft=True)] * 10 + [Mask(monotone=False), Train(50, 100)]
    assert most_epochs(schedule) == 100
    assert trains(schedule)
    assert not trains_first(schedule, NOTHING)


@pytest.mark.parametrize(
    ("epochs", "retrain", "frequency", "expected"),
    [
        (3, 0, 1, [Mask(monotone=False), Train(3, 3)]),
        (2, 2, 5, [SOFT, Train(2, 2, soft=True), Mask(monotone=False)]),
        (4, 3, 2, [SOFT, Train(2, 4, soft=True), SOFT, Train(1, 4, soft=True), Mask(monotone=False), Train(1, 4)]),
        (0, 0, 1, [Mask(monotone=False)]),
    ],
)
def test_iterative_ends_with_a_fixed_mask_also_at_the_edges(epochs, retrain, frequency, expected):
    schedule = functools.partial(iterative, epochs=epochs, retrain_epoch=retrain, prune_freq=frequency)
    assert requests(schedule) == expected
    assert most_epochs(schedule) == epochs == sum(r.epochs for r in expected if isinstance(r, Train))
    assert trains(schedule) == (epochs > 0)


def test_iterative_may_train_before_the_first_mask():
    schedule = functools.partial(iterative, epochs=6, retrain_epoch=4, prune_freq=2, start=3)
    assert requests(schedule) == [
        Train(3, 6, soft=True), SOFT, Train(1, 6, soft=True), Mask(monotone=False), Train(2, 6),
    ]  # fmt: skip
    assert trains_first(schedule, NOTHING)
    made = requests(functools.partial(iterative, epochs=6, retrain_epoch=4, prune_freq=2, start=4))
    assert made == [Train(4, 6, soft=True), Mask(monotone=False), Train(2, 6)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"retrain_epoch": 5, "start": -1}, "start"),
        ({"retrain_epoch": 5, "start": 6}, "start"),
        ({"retrain_epoch": 11}, "retrain_epoch"),
        ({"retrain_epoch": 5, "prune_freq": 0}, "prune_freq"),
    ],
)
def test_iterative_refuses_impossible_numbers_when_it_is_first_asked(keys, message):
    with pytest.raises(ConfigError, match=message):
        first_request(functools.partial(iterative, **{"epochs": 10, "prune_freq": 1, **keys}), NOTHING)


def test_admm_projects_before_and_after_every_training_then_masks_and_retrains():
    schedule = functools.partial(admm, iterations=2, epochs_per_iteration=3, rho=0.5, rho_growth=2.0, retrain_epochs=4)
    assert requests(schedule) == [
        Project(0.5), Train(3, 10, soft=True, penalty=True),
        Project(1.0), Train(3, 10, soft=True, penalty=True),
        Project(1.0), Mask(), Train(4, 10),
    ]  # fmt: skip
    assert most_epochs(schedule) == 10
    short = functools.partial(admm, iterations=1, epochs_per_iteration=1, rho=0.1)
    assert requests(short) == [Project(0.1), Train(1, 1, soft=True, penalty=True), Project(0.1), Mask()]
    assert most_epochs(short) == 1


def test_admm_rho_grows_to_its_bound():
    made = requests(
        functools.partial(admm, iterations=500, epochs_per_iteration=1, rho=1e-3, rho_growth=10.0, rho_max=0.05)
    )
    assert [request.rho for request in made if isinstance(request, Project)][:4] == [1e-3, 1e-2, 0.05, 0.05]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"iterations": 0}, "at least 1"),
        ({"epochs_per_iteration": 0}, "at least 1"),
        ({"retrain_epochs": -1}, "at least 0"),
        ({"rho": 0.0}, "above 0"),
        ({"rho": -1.0}, "above 0"),
        ({"rho": float("nan")}, "above 0"),
        ({"rho_growth": 0.5}, "at least 1"),
        ({"rho_max": 1e-4}, "below rho"),
        ({"iterations": 400, "rho_growth": 10.0}, "rho_max"),
    ],
)
def test_admm_refuses_impossible_numbers(keys, message):
    schedule = functools.partial(admm, **{"iterations": 3, "epochs_per_iteration": 1, "rho": 1e-3, **keys})
    with pytest.raises(ConfigError, match=message):
        first_request(schedule, NOTHING)


def test_a_schedule_that_does_not_say_how_long_it_trains_may_train():
    def adaptive(problem, *, patience=3):
        while (yield Train(1))["acc1"] < 90:
            pass

    assert most_epochs(functools.partial(adaptive, patience=2)) is None
    assert trains(adaptive)
    assert trains_first(adaptive, NOTHING)
