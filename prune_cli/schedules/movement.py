"""Movement pruning: scores learn which weights training moves away from zero (Sanh et al., arXiv:2005.07683)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prune_cli.errors import ScheduleError
from prune_cli.schedules.choices import countable
from prune_cli.schedules.gradual import fraction
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most

WARMUP, COOLDOWN = 0.05, 0.25  # of the epochs


@trains_at_most(lambda epochs: epochs)
def movement(
    problem: Problem,
    *,
    epochs: Annotated[int, Field(ge=1)],
    warmup_epochs: Annotated[int, Field(ge=0)] | None = None,
    cooldown_epochs: Annotated[int, Field(ge=0)] | None = None,
    every: Annotated[int, Field(ge=1)] = 10,
    mode: Literal["hard", "soft"] = "hard",
    threshold: float = 0.0,
    shrinkage: Annotated[float, Field(ge=0)] = 0.0,
) -> Requests:
    """Trains W' = W * M(S) and learns S <- S - lr * dL/dW' * W at every step, straight through the masks M (section 3).

    What is masked keeps its weight behind the mask and its score goes on moving, so it can come back with both. `hard`
    keeps the top v of the scores, v falling along a cubic; `soft` masks the scores below a threshold, whatever layer they
    are in, while a penalty lambda * sum of sigmoid(S) pulls all of them down, but never more than is asked for. Both end
    with exactly what is asked for, and train on with that.

    Args:
        problem: what is pruned.
        epochs: length of the whole stage.
        warmup_epochs: before the first mask, in which scores are learned already; None = 5 % of all.
        cooldown_epochs: with the last masks held; None = 25 %.
        every: optimizer steps between two masks; 1 as in the paper.
        mode: `hard` or `soft`.
        threshold: tau of `soft`.
        shrinkage: lambda of `soft`.

    Raises:
        ScheduleError: scores are not learned; there would be no mask in the time that is left; or `soft` with units that
            are chosen by patterns.
    """
    if not problem.learns:
        raise ScheduleError("schedule=movement ranks by scores that are learned in training; choose criterion=movement")
    if mode == "soft":
        countable(problem, "movement schedule.mode=soft")
    warmup = round(WARMUP * epochs) if warmup_epochs is None else warmup_epochs
    cooldown = round(COOLDOWN * epochs) if cooldown_epochs is None else cooldown_epochs
    length = (epochs - warmup) * problem.steps
    updates = (length - cooldown * problem.steps) // every
    if updates < 1:
        raise ScheduleError(
            f"schedule: epochs={epochs} without warmup_epochs={warmup} and cooldown_epochs={cooldown} are less than "
            f"every={every} optimizer steps; give more epochs, or fewer of these"
        )
    if warmup:
        yield Train(warmup, epochs, final=False, shrinkage=shrinkage)
    for update in range(1, updates + 1):
        yield Train(total=epochs, steps=every, final=False, shrinkage=shrinkage)
        if update == updates:
            break
        if mode == "hard":
            yield Mask(fraction(update / updates, 0.0, 3.0), monotone=False, hides=True)
        else:
            yield Mask(monotone=False, hides=True, threshold=threshold)
    yield Mask(monotone=False)
    if updates * every < length:
        yield Train(total=epochs)
