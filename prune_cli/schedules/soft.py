"""Soft filter pruning: what is masked keeps training, and may take the place of others (He et al., arXiv:1808.06866)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from scipy.optimize import brentq

from prune_cli.errors import ScheduleError
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most

BEND, AT_BEND = 1 / 8, 3 / 4  # of the epochs, and what is removed by then (arXiv:1808.07471, section III-C)


@trains_at_most(lambda epochs: epochs)
def soft(
    problem: Problem,
    *,
    epochs: Annotated[int, Field(ge=1)],
    soft_epochs: Annotated[int, Field(ge=1)],
    every: Annotated[int, Field(ge=1)] = 1,
    asymptotic: bool = False,
    initial: Annotated[float, Field(ge=0, lt=AT_BEND)] = 0.0,
) -> Requests:
    """After every `every` epochs zeroes what the criterion ranks lowest, and goes on training all of it (algorithm 1).

    Args:
        problem: what is pruned; this schedule is the same for all.
        epochs: length of the whole stage; those after `soft_epochs` train with the last masks held.
        soft_epochs: epochs in which masks are soft, at most `epochs`.
        every: epochs between two masks.
        asymptotic: remove little in the first masks and everything in the last (arXiv:1808.07471).
        initial: fraction of what is to be removed that the first mask removes, where `asymptotic`.

    Raises:
        ScheduleError: more soft epochs than there are.
    """
    if soft_epochs > epochs:
        raise ScheduleError(f"schedule: soft_epochs={soft_epochs} are more than epochs={epochs}; give fewer of them")
    rate = _rate(initial) if asymptotic else math.inf
    for epoch in range(0, soft_epochs, every):
        count = min(every, soft_epochs - epoch)
        yield Train(count, epochs, soft=True)
        now = (epoch + count) / soft_epochs
        fraction = _approached(now, initial, rate) if asymptotic else 1.0
        if now < 1:
            yield Mask(fraction, monotone=False, soft=True)
    yield Mask(monotone=False)
    if soft_epochs < epochs:
        yield Train(epochs - soft_epochs, epochs)


def _approached(now: float, initial: float, rate: float) -> float:
    """a exp(-rate * now) + b through (0, initial) and (1, 1)."""
    return initial + (1 - initial) * (1 - math.exp(-rate * now)) / (1 - math.exp(-rate))


def _rate(initial: float) -> float:
    """The rate with which the curve also goes through (BEND, AT_BEND); it exists as AT_BEND lies above the straight line."""
    return float(brentq(lambda rate: _approached(BEND, initial, rate) - AT_BEND, 1e-6, 100))
