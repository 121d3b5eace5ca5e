"""Choices that schedules make: how many units stay in each group, under a budget."""

from __future__ import annotations

import numpy as np

from prune_cli.errors import ScheduleError
from prune_cli.schedules.problem import Problem

Fractions = np.ndarray
"""Of each group's units, what stays; in [0, 1], in the order of `problem.groups`."""

HALVINGS = 40
LEVEL = 1e-3  # what everybody gives more where those that should give have nothing left


def countable(problem: Problem, name: str) -> None:
    """Refuses granularities whose units are not chosen by their number.

    Raises:
        ScheduleError: says which can be chosen.
    """
    if not problem.countable:
        raise ScheduleError(
            f"schedule={name} says how many units each layer keeps, but units of this granularity are chosen by patterns; "
            "choose granularity=filter, element, kernel or stripe, or another schedule"
        )


def removed_by(problem: Problem, part: float) -> float:
    """The fraction of what is to be removed that is removed after `part` of the rounds: 1 - K^part over 1 - K.

    K is what may remain of the target's quantity. Where every layer has the same ratio, each round takes the same share
    of what is left in each layer.
    """
    remains = problem.remains
    return 1.0 if part == 1 or remains >= 1 else (1 - remains**part) / (1 - remains)


def scaled(
    problem: Problem, goal: Fractions, *, begin: Fractions | None = None, allowed: float | None = None
) -> dict[str, int]:
    """The dearest choice that is allowed on the line from `begin` through `goal` and beyond.

    Where floors stop some groups before that, the others give more.

    Args:
        problem: what is pruned.
        goal: where the line leads.
        begin: where it begins; everything by default.
        allowed: what the choice may cost; the budget by default.

    Raises:
        ScheduleError: everything at its floor costs more than is allowed.
    """
    start = np.ones(len(problem.groups)) if begin is None else begin
    most = problem.budget if allowed is None else allowed

    def choice(factor: float) -> dict[str, int]:
        fractions = np.clip(start - (start - goal) * factor - max(factor - 1, 0) * LEVEL, 0, start)
        names = (group.name for group in problem.groups)
        return problem.counts(dict(zip(names, fractions.tolist(), strict=True)))

    low, high = 0.0, 1.0
    if problem.cost(choice(low)) <= most:
        return choice(low)
    while problem.cost(choice(high)) > most:
        if high > 1 / LEVEL:
            raise ScheduleError(
                f"schedule: floors leave {problem.cost(choice(high)):g} {problem.quantity}, but {most:g} are asked for; give a "
                "larger budget, or lower floors (granularity.min_keep, max_ratio, round_to)"
            )
        low, high = high, high * 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if problem.cost(choice(middle)) <= most else (middle, high)
    return choice(high)
