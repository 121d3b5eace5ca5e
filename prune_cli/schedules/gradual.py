"""Gradual pruning: what is removed grows along a polynomial while the network trains (Zhu and Gupta, arXiv:1710.01878)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prune_cli.errors import ScheduleError
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most

Unit = Literal["epoch", "step", "iteration"]
SPREAD = 3 / 4


@trains_at_most(lambda epochs: epochs)
def gradual(
    problem: Problem,
    *,
    epochs: Annotated[int, Field(ge=0)],
    updates: Annotated[int, Field(ge=1)],
    every: Annotated[int, Field(ge=1)] | None = None,
    unit: Unit = "epoch",
    start: Annotated[int, Field(ge=0)] = 0,
    initial: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    power: Annotated[float, Field(gt=0)] = 3.0,
    monotone: bool = True,
) -> Requests:
    """s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 (eq. 1), for t = t0, t0 + dt, ..., t0 + n dt.

    After the last of the n updates exactly what was asked for is removed; the rest of the epochs train with these masks.

    Args:
        problem: what is pruned; s_f is the granularity's ratio, or what its budget asks to remove.
        epochs: length of the whole stage.
        updates: n, mask updates after the one at t0.
        every: dt, between two of them; None = such that the last comes after three quarters of what follows `start`.
        unit: of `every` and `start`: epochs or optimizer steps of one training; or `iteration`: epochs, and every part is
            a training of its own, with the whole learning-rate schedule.
        start: t0, before which the network trains as it is.
        initial: s_i, as a fraction of s_f; 0 = no mask at t0.
        power: 3 as in the paper; 1 is linear.
        monotone: what is masked stays masked; else every update chooses among all weights, and those that the optimizer
            has left at zero can come back only by other layers giving way.

    Raises:
        ScheduleError: the last update comes after the end.
    """
    length = epochs * problem.steps if unit == "step" else epochs
    if every is None:
        every = max(round(SPREAD * (length - start)) // updates, 1)
    last = start + updates * every
    if last > length:
        raise ScheduleError(
            f"schedule: the last of updates={updates} comes after {last} {unit if unit == 'step' else 'epoch'}s, but "
            f"epochs={epochs} are {length}; give more epochs, or fewer updates, every or start"
        )

    def part(count: int) -> Train:
        if unit == "step":
            return Train(total=epochs, steps=count)
        return Train(count, epochs if unit == "epoch" else None)

    waiting = start
    for update in range(0 if initial else 1, updates + 1):
        waiting += every if update else 0
        if waiting:
            yield part(waiting)
        yield Mask(fraction(update / updates, initial, power), monotone=monotone)
        waiting = 0
    if last < length:
        yield part(length - last)


def fraction(part: float, initial: float, power: float) -> float:
    """s_t / s_f when `part` of the time between the first and the last update is over; 1 at the end, exactly."""
    return 1 - (1 - initial) * (1 - part) ** power
