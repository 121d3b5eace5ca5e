"""RigL: a network that is sparse from the beginning moves its weights to where gradients are (Evci et al., arXiv:1911.11134)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from prune_cli.errors import ScheduleError
from prune_cli.schedules.allocation import Allocation, Begin, allocated
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Regrow, Train
from prune_cli.schedules.schedule import Requests, trains_at_most


@trains_at_most(lambda epochs: epochs)
def rigl(
    problem: Problem,
    *,
    epochs: Annotated[int, Field(ge=1)],
    every: Annotated[int, Field(ge=1)] = 100,
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.3,
    stop: Annotated[float, Field(gt=0, le=1)] = 0.75,
    allocation: Allocation = "erk",
    begin: Begin = "random",
    rescale: bool = True,
) -> Requests:
    """Masks first, then at t = every, 2 every, ... < T drops alpha / 2 (1 + cos(pi t / T)) of each layer's weights, those
    of the smallest criterion, and lets as many grow where the gradient is largest (algorithm 1).

    Every layer has the same number of weights at all times. What grows begins at zero.

    Args:
        problem: what is pruned; the granularity's ratio, or budget, says how much is masked from the beginning.
        epochs: length of the whole stage.
        every: optimizer steps between two updates.
        fraction: alpha.
        stop: T, the end of the updates, as a fraction of the training.
        allocation: how many weights each layer has; see `allocation.allocated`.
        begin: how the first masks are chosen: `random`, for a network before training, or `criterion`.
        rescale: whether weights that stay at random are made larger, so that signals keep their size; see `Mask`.

    Raises:
        ScheduleError: there would be no update; or what `allocated` says.
    """
    kept = allocated(problem, allocation, "rigl")
    end = stop * epochs * problem.steps
    if every >= end:
        raise too_late(every, stop, epochs, problem)
    yield Mask(kept=kept, monotone=False, random=begin == "random", rescale=rescale and begin == "random")
    for step in range(every, math.ceil(end), every):
        yield Train(total=epochs, steps=every, final=False)
        yield Regrow(cosine(fraction, step / end), grow_by="gradient")
    yield Train(total=epochs)


def cosine(fraction: float, part: float) -> float:
    """What is left of a fraction when `part` of the time is over: half a cosine, from all to nothing (section 3)."""
    return fraction / 2 * (1 + math.cos(math.pi * part))


def too_late(every: int, stop: float, epochs: int, problem: Problem) -> ScheduleError:
    """The refusal of a schedule whose first update comes after the end of the updates."""
    return ScheduleError(
        f"schedule: the first update comes after every={every} optimizer steps, but the updates end after "
        f"stop={stop:g} of {epochs * problem.steps} (epochs={epochs}); give a smaller every, more epochs or a later stop"
    )
