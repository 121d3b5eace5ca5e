"""Simulated annealing over the layers' ratios (AutoCompress, Liu et al., arXiv:1907.03141, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from prune_cli.schedules.choices import countable, scaled
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import ACCEPTED, Evaluate, Judge, Mask, Request, Train
from prune_cli.schedules.schedule import Requests, trains_at_most, tries_at_most


@trains_at_most(lambda epochs: epochs, tries=True)
@tries_at_most(lambda candidates: candidates)
def simulated_annealing(
    problem: Problem,
    *,
    candidates: Annotated[int, Field(ge=2)] = 200,
    start_temperature: Annotated[float, Field(gt=0)] = 5.0,
    stop_temperature: Annotated[float, Field(gt=0)] = 0.1,
    magnitude: Annotated[float, Field(gt=0, le=1)] = 0.35,
    short_epochs: Annotated[int, Field(ge=0)] = 0,
    epochs: Annotated[int, Field(ge=0)] = 0,
) -> Requests:
    """Searches the ratios of the layers under the budget, then removes what the best of them say.

    Args:
        problem: what is pruned.
        candidates: choices that are scored, in all.
        start_temperature, stop_temperature: points of accuracy in percent: a candidate that is worse by the temperature is
            taken with probability 1/e. It falls geometrically, with every candidate.
        magnitude: largest change of a layer's fraction in the beginning; it falls with the temperature.
        short_epochs: epochs that each candidate trains before it is scored; 0 = norm statistics alone.
        epochs: epochs with the masks at the end.

    Raises:
        ScheduleError: the budget lies below what floors allow.
    """
    countable(problem, "simulated_annealing")
    best = yield from anneal(
        problem, candidates, start_temperature, stop_temperature, magnitude, short_epochs, name="annealing"
    )
    yield Mask(kept=best)
    if epochs:
        yield Train(epochs)


def anneal(
    problem: Problem,
    candidates: int,
    start_temperature: float,
    stop_temperature: float,
    magnitude: float,
    short_epochs: int,
    *,
    name: str,
    allowed: float | None = None,
) -> Generator[Request, Any, dict[str, int]]:
    """The search alone: the best choice that was scored.

    The first candidate takes the same fraction of every group. Every choice meets the budget as nearly as whole units do,
    by scaling what goes, not by drawing again.

    Args:
        name: of the random numbers.
        allowed: what a choice may cost; the budget by default.
    """
    generator = problem.generator(name)
    now = np.full(len(problem.groups), 0.5)
    kept = scaled(problem, now, allowed=allowed)
    (score,) = yield Evaluate([kept], train=short_epochs)
    yield Judge([ACCEPTED])
    best, best_score = kept, score
    cooling = (min(stop_temperature, start_temperature) / start_temperature) ** (1 / max(candidates - 2, 1))
    temperature = start_temperature
    for _ in range(candidates - 1):
        reach = magnitude * temperature / start_temperature
        moved = np.clip(now + generator.uniform(-reach, reach, len(now)), 0, 1)
        kept = scaled(problem, moved, allowed=allowed)
        (found,) = yield Evaluate([kept], train=short_epochs)
        if accepted(found - score, temperature, generator):
            now, score = moved, found
            yield Judge([ACCEPTED])
        else:
            yield Judge([f"{score - found:.4g} points worse, at a temperature of {temperature:.3g}"])
        if found > best_score:
            best, best_score = kept, found
        temperature *= cooling
    return best


def accepted(gain: float, temperature: float, generator: np.random.Generator) -> bool:
    """Whether a candidate that is better by `gain` points is gone on from: always, and with exp(gain / T) if it is worse."""
    return gain >= 0 or generator.random() < math.exp(gain / temperature)
