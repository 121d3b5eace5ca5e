"""How many units each layer keeps in a network that is sparse from the beginning."""

from __future__ import annotations

from math import prod
from typing import Literal

import numpy as np

from prune_cli.errors import ScheduleError
from prune_cli.schedules.choices import countable, scaled
from prune_cli.schedules.problem import Group, Problem
from prune_cli.schedules.requests import Kept

Allocation = Literal["uniform", "erk"]
Begin = Literal["random", "criterion"]
"""How the units of a sparse network are chosen: at random, or by the criterion, for weights that are trained already."""

HALVINGS = 60


def allocated(problem: Problem, allocation: Allocation, schedule: str) -> Kept:
    """Units that stay in each group.

    `uniform`: what the granularity asks of each, or of a budget the same fraction of all. `erk`: as many in all, a layer's
    density in proportion to the sum of the sizes of its weight's axes over their product, at most 1 (Erdos-Renyi-Kernel,
    Evci et al., arXiv:1911.11134, section 3; of linear layers what Mocanu et al. ask, arXiv:1707.04780, eq. 3). Layers
    with a ratio of 0 stay whole.

    Args:
        schedule: name of the schedule that asks.

    Raises:
        ScheduleError: units of this granularity cannot be counted, or cannot grow one by one; or even the smallest choice
            costs more than is allowed.
    """
    countable(problem, schedule)
    if not problem.regrows:
        raise ScheduleError(
            f"schedule={schedule} lets units grow from zero, but a channel gets no gradient while all that reads it is "
            "masked; choose granularity=element, kernel or stripe, or schedule=soft"
        )
    if allocation == "erk":
        return _erdos_renyi(problem)
    if problem.quantity == "units":
        return problem.counts({group.name: 1 - group.ratio for group in problem.groups})
    return scaled(problem, np.zeros(len(problem.groups)))


def _erdos_renyi(problem: Problem) -> Kept:
    """The densest network whose layers' densities stand in that proportion: by bisection over the common factor."""

    def choice(factor: float) -> dict[str, int]:
        return problem.counts({group.name: _density(group, factor) for group in problem.groups})

    low, high = 0.0, 1.0
    if problem.cost(choice(low)) > problem.budget:
        raise ScheduleError(
            f"schedule: floors leave {problem.cost(choice(low)):g} {problem.quantity}, but {problem.budget:g} are asked for; "
            "give a lower ratio or a larger budget, or lower floors (granularity.min_keep, max_ratio, round_to)"
        )
    while problem.cost(choice(high)) <= problem.budget:
        if all(_density(group, high) == 1 for group in problem.groups):
            return choice(high)
        low, high = high, high * 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.cost(choice(middle)) <= problem.budget else (low, middle)
    return choice(low)


def _density(group: Group, factor: float) -> float:
    """Of a layer in proportion to how large its axes are beside all their products; 1 where nothing is asked of it."""
    if not group.ratio:
        return 1.0
    axes = group.layers[0].weight if group.layers else (group.units,)
    return min(1.0, factor * sum(axes) / prod(axes))
