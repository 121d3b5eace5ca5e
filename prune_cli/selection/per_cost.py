"""The order in which channels go under a budget: what a unit holds of its layers, per multiply-add that it saves.

Scores of different layers cannot be compared: a filter's sum grows with its weights, and a channel of a residual stream
costs as much as those of ten branches. So a unit is worth its share of what is left of each layer that makes it or reads
it, summed over these layers (`lamp`, arXiv:2010.07611, for one layer), and the unit goes next whose worth per multiply-add
(or parameter) saved is the least. Both change while units go: what is left of a layer becomes dearer, and what it saves in
the layers around it less, so no layer is emptied before the others are small too.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from prune_cli.granularities.units import Group
from prune_cli.selection.budget import Budget
from prune_cli.selection.ranking import Limits
from prune_cli.structure.plan import Plan

ROUNDS = 500  # how often at least savings are counted again


def positions(groups: Sequence[Group], limits: Limits, budget: Budget) -> list[Group]:
    """The groups with the place of every unit in the common order as its score.

    Behind the place at which the budget is met, units follow by what they are worth alone.

    Args:
        groups: of a channel plan, with `parts`; those whose scores are drawn come back as they are.
        budget: in multiply-adds or parameters.
    """
    if not groups or any(group.comparable for group in groups):
        return list(groups)
    structure = groups[0].structure
    assert structure is not None, "units that run through several layers have a channel plan"
    order = _Order(groups, limits, structure.plan, budget)
    order.until_met()
    return [
        replace(group, scores=order.scores(index).to(group.scores.device), comparable=True)
        for index, group in enumerate(groups)
    ]


class _Order:
    """Units that went so far.

    Attributes:
        taken: per group, how many.
        places: per group, when each of them went.
    """

    def __init__(self, groups: Sequence[Group], limits: Limits, plan: Plan, budget: Budget) -> None:
        self._plan, self._budget, self._groups = plan, budget, groups
        self._worth = [worth(group) for group in groups]
        self._caps = [limits.cap(group) for group in groups]
        self._keep = plan.everything()
        self._total = sum(group.scores.numel() for group in groups)
        self.taken = [0] * len(groups)
        self.places: list[list[int]] = [[] for _ in groups]

    def until_met(self) -> None:
        """Takes units, the cheapest loss first, until the budget is met or nothing more may go."""
        now = self._count()
        allowed, place = self._budget.allowed(Fraction(1), now), 0
        while now > allowed:
            queue = self._queue(now)
            if not queue:
                return
            for _ in range(max(1, self._total // ROUNDS)):
                if not queue:
                    break
                _, index, saved = heapq.heappop(queue)
                self._take(index, place)
                place += 1
                if self.taken[index] < self._caps[index]:
                    heapq.heappush(queue, (self._next(index) / saved, index, saved))
            now = self._count()

    def scores(self, index: int) -> Tensor:
        """The places of one group's units; those that did not go come behind all, in the order of their worth."""
        order, _ = self._worth[index]
        found = torch.empty(len(order), dtype=torch.double)
        left = range(len(order) - self.taken[index])
        found[order] = torch.tensor([*self.places[index], *(self._total + place for place in left)], dtype=torch.double)
        return found

    def _queue(self, now: int) -> list[tuple[float, int, float]]:
        """Per group that may lose more: worth of the next unit per cost saved, the group, and what the unit saves."""
        queue = []
        for index, cap in enumerate(self._caps):
            if self.taken[index] < cap:
                unit = self._unit(index)
                self._keep[unit] = False
                saved = float(max(now - self._count(), 1))
                self._keep[unit] = True
                queue.append((self._next(index) / saved, index, saved))
        heapq.heapify(queue)
        return queue

    def _take(self, index: int, place: int) -> None:
        self._keep[self._unit(index)] = False
        self.places[index].append(place)
        self.taken[index] += 1

    def _unit(self, index: int) -> int:
        """The id in the plan of the next unit of a group."""
        structure = self._groups[index].structure
        assert structure is not None
        return int(structure.units[int(self._worth[index][0][self.taken[index]])])

    def _next(self, index: int) -> float:
        return float(self._worth[index][1][self.taken[index]])

    def _count(self) -> int:
        cost = self._plan.count(self._keep)
        return cost.macs if self._budget.quantity == "macs" else cost.params


def worth(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """The units of a group from the least worth up, and what each is worth when those before it are gone.

    A unit's worth is its share of what is left in every layer that it runs through, summed over them; the order is that of
    the shares of whole layers. What is masked already comes first and is worth nothing.

    Returns:
        (n,) indices and (n,) numbers from 0 to the number of layers.
    """
    assert group.parts is not None, "units that run through several layers have parts"
    parts = group.parts().clamp_min(0)
    dead = group.scores.cpu() == float("-inf")
    parts[:, dead] = 0
    shares = parts / parts.sum(1, keepdim=True).clamp_min(1e-300)
    order = torch.sort(shares.sum(0).masked_fill(dead, -1), stable=True).indices
    ordered = shares[:, order]
    left = ordered.flip(1).cumsum(1).flip(1)
    return order.numpy(), (ordered / left.clamp_min(1e-300)).sum(0).numpy()
