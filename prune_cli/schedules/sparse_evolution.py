"""Sparse evolutionary training (SET): the weakest weights go, and as many grow at random (Mocanu et al., arXiv:1707.04780)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from prune_cli.schedules.allocation import Allocation, Begin, allocated
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Regrow, Train
from prune_cli.schedules.rigl import cosine, too_late
from prune_cli.schedules.schedule import Requests, trains_at_most


@trains_at_most(lambda epochs: epochs)
def sparse_evolution(
    problem: Problem,
    *,
    epochs: Annotated[int, Field(ge=1)],
    every: Annotated[int, Field(ge=1)] | None = None,
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.3,
    decay: Literal["none", "cosine"] = "none",
    stop: Annotated[float, Field(gt=0, le=1)] = 1.0,
    allocation: Allocation = "erk",
    begin: Begin = "random",
    rescale: bool = True,
) -> Requests:
    """Masks first, then after every epoch but the last drops zeta of each layer's weights, those of the smallest criterion,
    and lets as many grow at random (algorithm 1).

    Every layer has the same number of weights at all times. What grows begins at zero; the paper draws it.

    Args:
        problem: what is pruned; the granularity's ratio, or budget, says how much is masked from the beginning.
        epochs: length of the whole stage.
        every: optimizer steps between two updates; None = those of an epoch.
        fraction: zeta.
        decay: `none`, or `cosine`: it falls to nothing at the end of the updates, as arXiv:1911.11134 does it for SET too.
        stop: the end of the updates, as a fraction of the training.
        allocation: how many weights each layer has; see `allocation.allocated`.
        begin: how the first masks are chosen: `random`, for a network before training, or `criterion`.
        rescale: whether weights that stay at random are made larger, so that signals keep their size; see `Mask`.

    Raises:
        ScheduleError: there would be no update; or what `allocated` says.
    """
    kept = allocated(problem, allocation, "set")
    each, end = every or problem.steps, stop * epochs * problem.steps
    if each >= end:
        raise too_late(each, stop, epochs, problem)
    yield Mask(kept=kept, monotone=False, random=begin == "random", rescale=rescale and begin == "random")
    for step in range(each, math.ceil(end), each):
        yield Train(total=epochs, steps=each, final=False)
        yield Regrow(fraction if decay == "none" else cosine(fraction, step / end), grow_by="random")
    yield Train(total=epochs)
