"""AutoCompress: annealing for the ratios, ADMM for the weights, then a smaller network, in rounds (arXiv:1907.03141)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prune_cli.schedules.choices import countable
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Project, Shrink, Train
from prune_cli.schedules.schedule import Requests, trains_at_most, tries_at_most
from prune_cli.schedules.simulated_annealing import anneal


@trains_at_most(
    lambda rounds, iterations, epochs_per_iteration, epochs: rounds * iterations * epochs_per_iteration + epochs,
    tries=True,
)
@tries_at_most(lambda rounds, candidates: rounds * candidates)
def auto_compress(
    problem: Problem,
    *,
    rounds: Annotated[int, Field(ge=1)] = 3,
    candidates: Annotated[int, Field(ge=2)] = 60,
    start_temperature: Annotated[float, Field(gt=0)] = 5.0,
    stop_temperature: Annotated[float, Field(gt=0)] = 0.1,
    magnitude: Annotated[float, Field(gt=0, le=1)] = 0.35,
    iterations: Annotated[int, Field(ge=1)] = 3,
    epochs_per_iteration: Annotated[int, Field(ge=1)] = 1,
    rho: Annotated[float, Field(gt=0)] = 1e-3,
    rho_growth: Annotated[float, Field(ge=1)] = 1.6,
    epochs: Annotated[int, Field(ge=0)] = 0,
) -> Requests:
    """In each round takes the same share of the cost that is left, until the budget is met (section 4).

    Where the granularity cannot take units out, they stay masked from round to round.

    Args:
        problem: what is pruned.
        rounds: of annealing, ADMM and shrinking.
        candidates, start_temperature, stop_temperature, magnitude: of each annealing; see `simulated_annealing`.
        iterations: W-steps of ADMM in each round.
        epochs_per_iteration: length of each; the iterations of a round are one training.
        rho: weight of the penalty in the first iteration of a round.
        rho_growth: factor on it from one to the next.
        epochs: with the last masks, or the smallest network, at the end.

    Raises:
        ScheduleError: the budget lies below what floors allow, or units of this granularity cannot be counted.
    """
    countable(problem, "auto_compress")
    whole, remains = problem.cost(problem.whole), problem.remains
    for number in range(1, rounds + 1):
        allowed = problem.budget if number == rounds else whole * remains ** (number / rounds)
        kept = yield from anneal(
            problem,
            candidates,
            start_temperature,
            stop_temperature,
            magnitude,
            0,
            name=f"annealing {number}",
            allowed=allowed,
        )
        for iteration in range(iterations):
            yield Project(rho * rho_growth**iteration, kept)
            yield Train(epochs_per_iteration, iterations * epochs_per_iteration, soft=True, penalty=True)
        yield Project(rho * rho_growth ** (iterations - 1), kept)
        yield Mask(kept=kept)
        problem = (yield Shrink()) if problem.shrinks else problem.masked(kept)
    if epochs:
        yield Train(epochs)
