"""Lottery tickets: rounds of training, pruning and going back (Frankle and Carbin, arXiv:1803.03635)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from prune_cli.errors import ScheduleError
from prune_cli.schedules.choices import removed_by
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Project, Remember, Request, Restore, Train
from prune_cli.schedules.schedule import Requests, trains_at_most

PRETRAINED, FRESH = "pretrained", "fresh"
TICKET = "ticket"


@trains_at_most(lambda rounds, epochs, train_first, admm: epochs * (rounds + train_first) + rounds * admm)
def lottery_ticket(
    problem: Problem,
    *,
    rounds: Annotated[int, Field(ge=1)],
    epochs: Annotated[int, Field(ge=1)],
    rewind_to: str = "init",
    rewind: Literal["weights", "rate"] = "weights",
    train_first: bool = True,
    output_rate: Annotated[float, Field(gt=0, le=1)] = 1.0,
    control: Literal["none", "random_ticket", "random_init"] = "none",
    admm: Annotated[int, Field(ge=0)] = 0,
    rho: Annotated[float, Field(gt=0)] = 1e-4,
) -> Requests:
    """Iterative pruning with rewinding: in each of n rounds p = 1 - (1 - P)^(1/n) of what is left goes.

    Weights, norm statistics, moments and learning rate go back to an earlier moment, the masks stay; then it trains to the
    end again. The last round's network before that training is left as `remembered_ticket.safetensors`.

    Args:
        problem: what is pruned; P is the granularity's ratio, or what its budget asks to remove.
        rounds: n.
        epochs: length of each training.
        rewind_to: `init`; steps or epochs into the training, as `500st` or `3ep` (arXiv:1912.05671); or `pretrained`, the
            weights that came to the stage.
        rewind: `weights`, or `rate`: the learning rate goes back and the weights stay (Renda et al., arXiv:2003.02389).
        train_first: train the network that comes once before the first round; false where a train stage has done that,
            which must have remembered steps or epochs to rewind to.
        output_rate: factor on p in the last layer; 0.5 in the paper.
        control: `random_ticket` draws the last round's masks at random, as many in every layer; `random_init` trains the
            ticket from other initial weights.
        admm: epochs in each round, before it chooses, in which weights are drawn towards their projections, which are
            renewed after every one (W-steps of ADMM, arXiv:1804.03294): onto what the round leaves where every layer has a
            ratio, else onto the whole target.
        rho: weight of that penalty.

    Raises:
        ScheduleError: a moment that is not there, or one that comes after the end.
    """
    _check(problem, epochs, rewind_to, train_first, output_rate)
    inside = train_first and rewind_to not in problem.tags and rewind_to != PRETRAINED
    if rewind_to == PRETRAINED:
        yield Remember(PRETRAINED)
    if inside:
        yield _until(rewind_to, epochs)
        yield Remember(rewind_to)
    if train_first:
        yield Train(total=epochs)
    for number in range(1, rounds + 1):
        last = number == rounds
        yield from _drawn(problem, number, rounds, admm, rho)
        chosen = yield _mask(problem, number, rounds, output_rate)
        if last and control == "random_ticket":
            yield Mask(kept=chosen["kept"] if problem.countable else None, random=True, monotone=False)
        yield Restore(rewind_to, weights=rewind == "weights", clock=True)
        if last and control == "random_init":
            yield Restore(FRESH, clock=True)
        if last:
            yield Remember(TICKET, leave=True)
        yield Train(total=epochs)


def _drawn(problem: Problem, number: int, rounds: int, steps: int, rho: float) -> Requests:
    """W-steps of ADMM, a training of their own."""
    kept = None
    if problem.quantity == "units" and problem.countable and problem.scope == "layer":
        kept = problem.counts({group.name: (1 - group.ratio) ** (number / rounds) for group in problem.groups})
    for _ in range(steps):
        yield Project(rho, kept)
        yield Train(1, steps, soft=True, penalty=True)
    if steps:
        yield Project(rho, kept)


def _mask(problem: Problem, number: int, rounds: int, output_rate: float) -> Request:
    if output_rate == 1:
        return Mask(removed_by(problem, number / rounds))
    output = max(problem.groups, key=lambda group: group.depth)
    fractions = {}
    for group in problem.groups:
        each = 1 - (1 - group.ratio) ** (1 / rounds)
        fractions[group.name] = (1 - each * (output_rate if group is output else 1.0)) ** number
    return Mask(kept=problem.counts(fractions))


def _until(tag: str, epochs: int) -> Train:
    count, unit = int(tag[:-2]), tag[-2:]
    return Train(count, epochs) if unit == "ep" else Train(total=epochs, steps=count)


def _check(problem: Problem, epochs: int, rewind_to: str, train_first: bool, output_rate: float) -> None:
    if rewind_to not in (*problem.tags, PRETRAINED):
        match = re.fullmatch(r"([1-9]\d*)(st|ep)", rewind_to)
        known = ", ".join(tag for tag in problem.tags if tag != FRESH)
        if not match or not train_first:
            raise ScheduleError(
                f"schedule.rewind_to: {rewind_to!r} is not there; give pretrained, {known}, or with "
                "schedule.train_first=true steps as 500st or epochs as 3ep"
            )
        moment = int(match[1]) * (problem.steps if match[2] == "ep" else 1)
        if moment >= epochs * problem.steps:
            raise ScheduleError(f"schedule.rewind_to: {rewind_to} is not before the end of epochs={epochs}")
    if output_rate != 1 and (problem.scope != "layer" or not problem.countable or problem.quantity != "units"):
        raise ScheduleError(
            "schedule.output_rate: the last layer has a rate of its own only where every layer has; choose "
            "granularity.scope=layer with a ratio, or schedule.output_rate=1"
        )
