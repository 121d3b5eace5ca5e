"""Schedules as the sequences of requests that they make."""

from __future__ import annotations

import functools
import json

import pytest

from prune_cli.errors import ConfigError
from prune_cli.schedules.iterative import iterative
from prune_cli.schedules.one_shot import one_shot
from prune_cli.schedules.requests import Done, Mask, Train


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


def test_iterative_refuses_impossible_numbers():
    with pytest.raises(ConfigError, match="retrain_epoch"):
        iterative(None, epochs=10, retrain_epoch=11, prune_freq=1)
    with pytest.raises(ConfigError, match="prune_freq"):
        iterative(None, epochs=10, retrain_epoch=5, prune_freq=0)
