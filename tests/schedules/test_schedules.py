"""Schedules as the sequences of requests that they make."""

from __future__ import annotations

import functools
import json

import pytest

from prune_cli.errors import ConfigError
from prune_cli.schedules.admm import admm
from prune_cli.schedules.iterative import iterative
from prune_cli.schedules.one_shot import one_shot
from prune_cli.schedules.requests import Done, Mask, Split, Train


def requests(schedule):
    memo, request = schedule(None)
    made = [request]
    while not isinstance(request, Done):
        memo, request = schedule(json.loads(json.dumps(memo)))
        made.append(request)
    return made


def test_one_shot():
    assert requests(one_shot) == [Mask(), Done()]


def test_iterative_masks_at_every_fifth_soft_epoch_and_once_more_before_the_hard_phase():
    made = requests(functools.partial(iterative, epochs=100, retrain_epoch=50, prune_freq=5))
    soft = [request.until for request in made if isinstance(request, Train) and not request.enforce]
    assert soft == list(range(5, 51, 5))
    assert made[0] == Mask(monotone=False)
    assert made[-3:] == [Mask(monotone=False), Train(100, 100), Done()]
    assert sum(isinstance(request, Mask) for request in made) == 11


@pytest.mark.parametrize(
    ("epochs", "retrain", "frequency", "expected"),
    [
        (3, 0, 1, [Mask(monotone=False), Train(3, 3), Done()]),
        (2, 2, 5, [Mask(monotone=False), Train(2, 2, enforce=False), Mask(monotone=False), Done()]),
        (0, 0, 1, [Mask(monotone=False), Done()]),
    ],
)
def test_iterative_ends_masked_also_at_the_edges(epochs, retrain, frequency, expected):
    assert (
        requests(functools.partial(iterative, epochs=epochs, retrain_epoch=retrain, prune_freq=frequency)) == expected
    )


def test_iterative_may_train_before_the_first_mask():
    made = requests(functools.partial(iterative, epochs=6, retrain_epoch=4, prune_freq=2, start=3))
    assert made == [
        Train(3, 6, enforce=False), Mask(monotone=False), Train(4, 6, enforce=False), Mask(monotone=False),
        Train(6, 6), Done(),
    ]  # fmt: skip
    made = requests(functools.partial(iterative, epochs=6, retrain_epoch=4, prune_freq=2, start=4))
    assert made == [Train(4, 6, enforce=False), Mask(monotone=False), Train(6, 6), Done()]


def test_iterative_refuses_impossible_numbers():
    for start in (-1, 6):
        with pytest.raises(ConfigError, match="start"):
            iterative(None, epochs=10, retrain_epoch=5, prune_freq=1, start=start)
    with pytest.raises(ConfigError, match="retrain_epoch"):
        iterative(None, epochs=10, retrain_epoch=11, prune_freq=1)
    with pytest.raises(ConfigError, match="prune_freq"):
        iterative(None, epochs=10, retrain_epoch=5, prune_freq=0)


def test_admm_splits_before_and_after_every_training_then_masks_and_retrains():
    made = requests(
        functools.partial(admm, iterations=2, epochs_per_iteration=3, rho=0.5, rho_growth=2.0, retrain_epochs=4)
    )
    assert made == [
        Split(0.5), Train(3, 10, enforce=False, pull=True),
        Split(1.0), Train(6, 10, enforce=False, pull=True),
        Split(1.0), Mask(), Train(10, 10), Done(),
    ]  # fmt: skip
    assert requests(functools.partial(admm, iterations=1, epochs_per_iteration=1, rho=0.1)) == [
        Split(0.1), Train(1, 1, enforce=False, pull=True), Split(0.1), Mask(), Done(),
    ]  # fmt: skip


def test_admm_rho_grows_to_its_bound():
    made = requests(
        functools.partial(admm, iterations=500, epochs_per_iteration=1, rho=1e-3, rho_growth=10.0, rho_max=0.05)
    )
    assert [request.rho for request in made if isinstance(request, Split)][:4] == [1e-3, 1e-2, 0.05, 0.05]


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
    with pytest.raises(ConfigError, match=message):
        admm(None, **{"iterations": 3, "epochs_per_iteration": 1, "rho": 1e-3, **keys})
