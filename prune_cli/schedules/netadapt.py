"""NetAdapt: of all layers the one that is cheapened with the least loss, again and again (Yang et al., arXiv:1804.03230)."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from prune_cli.errors import ScheduleError
from prune_cli.schedules.choices import countable
from prune_cli.schedules.problem import Group, Problem
from prune_cli.schedules.requests import Evaluate, Kept, Train
from prune_cli.schedules.schedule import Requests, trains_at_most


@trains_at_most(lambda long_epochs: long_epochs, tries=True)
def netadapt(
    problem: Problem,
    *,
    step: Annotated[float, Field(gt=0, lt=1)] = 0.05,
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0,
    short_epochs: Annotated[int, Field(ge=0)] = 1,
    long_epochs: Annotated[int, Field(ge=0)] = 0,
) -> Requests:
    """Algorithm 1: one proposal per group of coupled layers and round, each as much cheaper; the best one stays.

    The resource is that of the granularity's budget: MACs, parameters or predicted milliseconds; units where it has a
    ratio. It is never counted as met: every round asks what the choice costs.

    Args:
        problem: what is pruned.
        step: what the first round takes off, as a fraction of the whole network's cost.
        decay: factor on it from round to round.
        short_epochs: epochs that each proposal trains before it is scored; 0 = norm statistics alone.
        long_epochs: epochs with the last masks at the end.

    Raises:
        ScheduleError: the steps can never add up to what the budget asks for, or nothing can shrink any more.
    """
    countable(problem, "netadapt")
    cost = problem.cost(problem.whole)
    if decay < 1 and step / (1 - decay) < 1 - problem.remains:
        raise ScheduleError(
            f"schedule: steps that begin with {step:g} and shrink by {decay:g} add up to {step / (1 - decay):.3g} at most, but "
            f"{1 - problem.remains:.3g} of the {problem.quantity} have to go; give a larger step, or decay=1"
        )
    kept, reduction = problem.whole, step * cost
    while problem.cost(kept) > problem.budget:
        allowed = _allowed(problem, kept, reduction)
        proposals = [_proposal(problem, kept, group, allowed) for group in problem.groups]
        scores = yield Evaluate(proposals, train=short_epochs, adopt=True, within=allowed)
        kept = max(zip(proposals, scores, strict=True), key=lambda one: -math.inf if one[1] is None else one[1])[0]
        reduction *= decay
    if long_epochs:
        yield Train(long_epochs)


def _proposal(problem: Problem, kept: Kept, group: Group, allowed: float) -> dict[str, int]:
    """A choice that costs no more than is allowed by what one group gives; all that it can, where that is too little."""
    found = problem.cheapen(kept, group, allowed)
    return found or {**problem.whole, **kept, group.name: min(group.least, kept[group.name])}


def _allowed(problem: Problem, kept: Kept, reduction: float) -> float:
    """What a round's choice may cost: less by `reduction`, or by what is left to the budget.

    Where no group can give as much, what is asked for is halved: a round always gets nearer.
    """
    cost = problem.cost(kept)
    while reduction > 0:
        allowed = max(cost - reduction, problem.budget)
        if any(problem.cheapen(kept, group, allowed) is not None for group in problem.groups):
            return allowed
        reduction = reduction / 2 if cost - reduction / 2 < cost else 0
    raise ScheduleError(
        f"schedule: nothing can shrink any more at {cost:g} {problem.quantity}, but {problem.budget:g} are asked for; give a "
        "larger budget, or lower floors (granularity.min_keep, max_ratio, round_to)"
    )
