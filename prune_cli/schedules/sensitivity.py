"""Ratios by how much each layer can lose alone, in rounds (Han et al., arXiv:1506.02626; NNI's sensitivity pruner)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from prune_cli.schedules.choices import countable, scaled
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import ACCEPTED, Evaluate, Judge, Kept, Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most, tries_at_most


@trains_at_most(lambda rounds, epochs: rounds * epochs, tries=True)
@tries_at_most(lambda problem, grid, rounds: rounds * (1 + len(problem.groups) * len(grid)))
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
    falls by at most `delta` of what it is in the round's beginning. Where the budget asks for more than all of them, more is
    allowed to be lost, the same of every group: none goes beyond what was looked at while another could.

    Args:
        problem: what is pruned.
        grid: fractions of what a group still has that are tried.
        delta: points of accuracy in percent that are safe.
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
        yield Judge([ACCEPTED, *(_verdict(score, scores[0], delta) for score in scores[1:])])
        kept = _choice(problem, kept, sorted(grid), scores, delta, allowed)
        yield Mask(kept=kept)
        if epochs:
            yield Train(epochs)


def _choice(
    problem: Problem, kept: Kept, grid: list[float], scores: list[float], delta: float, allowed: float
) -> dict[str, int]:
    """The dearest choice that is allowed on the way from what there is, through what is safe, to what loses more."""
    names = [group.name for group in problem.groups]
    left = np.array([kept[group.name] / group.units for group in problem.groups])
    lower = sorted({score for score in scores[1:] if score < scores[0] - delta}, reverse=True)
    begin = goal = left
    for least in [scores[0] - delta, *lower]:
        safe = _last_safe(list(kept), grid, scores[1:], least)
        begin, goal = goal, left * (1 - np.array([safe[name] for name in names]))
        if problem.cost(problem.counts(dict(zip(names, goal.tolist(), strict=True)))) <= allowed:
            return scaled(problem, goal, begin=begin, allowed=allowed)
    return scaled(problem, goal, begin=goal, allowed=allowed)


def _less(problem: Problem, kept: Kept, name: str, ratio: float) -> dict[str, int]:
    group = problem.group(name)
    fewer = problem.counts({name: kept[name] / group.units * (1 - ratio)})[name]
    return {**kept, name: min(fewer, kept[name])}


def _verdict(score: float, whole: float, delta: float) -> str:
    return ACCEPTED if score >= whole - delta else f"loses {whole - score:.4g} points of at most {delta:g}"


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
