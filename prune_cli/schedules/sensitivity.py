"""Ratios by how much each layer can lose alone, in rounds (Han et al., arXiv:1506.02626; NNI's sensitivity pruner)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from prune_cli.schedules.choices import countable, scaled
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Evaluate, Kept, Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most


@trains_at_most(lambda rounds, epochs: rounds * epochs, tries=True)
def sensitivity(
    problem: Problem,
    *,
    grid: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    delta: Annotated[float, Field(ge=0)] = 2.0,
    rounds: Annotated[int, Field(ge=1)] = 1,
    epochs: Annotated[int, Field(ge=0)] = 0,
) -> Requests:
    """Looks in each round how much each group may lose alone, and takes off in that proportion what the budget asks.

    The last safe ratio of a group is the largest of the grid at which, and below which, the accuracy on held-out images
    falls by at most `delta` of what it is in the round's beginning.

    Args:
        problem: what is pruned.
        grid: fractions of what a group still has that are tried.
        delta: points of accuracy in percent.
        rounds: each takes the same share of what is left.
        epochs: of recovery after each round, a training of its own.

    Raises:
        ScheduleError: the budget lies below what floors allow, or units of this granularity cannot be counted.
    """
    countable(problem, "sensitivity")
    kept = problem.whole
    for number in range(1, rounds + 1):
        allowed = (
            problem.budget if number == rounds else problem.cost(problem.whole) * problem.remains ** (number / rounds)
        )
        trials = [_less(problem, kept, name, ratio) for name in kept for ratio in sorted(grid)]
        scores = yield Evaluate([kept, *trials])
        safe = _last_safe(list(kept), sorted(grid), scores[1:], scores[0] - delta)
        left = np.array([kept[group.name] / group.units for group in problem.groups])
        goal = left * (1 - np.array([safe[group.name] for group in problem.groups]))
        kept = scaled(problem, goal, begin=left, allowed=allowed)
        yield Mask(kept=kept)
        if epochs:
            yield Train(epochs)


def _less(problem: Problem, kept: Kept, name: str, ratio: float) -> dict[str, int]:
    group = problem.group(name)
    fewer = problem.counts({name: kept[name] / group.units * (1 - ratio)})[name]
    return {**kept, name: min(fewer, kept[name])}


def _last_safe(names: list[str], grid: list[float], scores: list[float], least: float) -> dict[str, float]:
    """Name -> the largest ratio up to which every score is at least `least`; half of the first where none is."""
    found = {}
    for index, name in enumerate(names):
        own = scores[index * len(grid) : (index + 1) * len(grid)]
        found[name] = grid[0] / 2
        for ratio, score in zip(grid, own, strict=True):
            if score < least:
                break
            found[name] = ratio
    return found
