"""How many units go from every group, and in which order: ratios, floors, caps, rounding, ranking, votes. All pure.

A `Group` holds units that compete; `rank` sorts them once; `Ranking.counts(fraction)` then says for any part of the
request how many go from each group. Counts never fall as the fraction grows, which is what searching a budget needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prune_cli.granularities.units import Group, Normalize
from prune_cli.structure.keep import removed

Scope = Literal["layer", "row", "global"]


@dataclass(frozen=True)
class Limits:
    """What bounds the number of units that go from one group, or from each line of one.

    Attributes:
        min_keep: fraction of the units that always stays, rounded down, at least one unit.
        max_ratio: largest fraction that may go, for all layers or by dotted layer name; of coupled layers the
            smallest holds.
        round_to: the number of units kept is rounded up to a multiple of this, at most to all of them; a group that
            has fewer units than this stays whole.
    """

    min_keep: float = 0.0
    max_ratio: float | Mapping[str, float] = 1.0
    round_to: int = 1

    def cap(self, group: Group) -> int:
        """Units that may go from each line, before rounding."""
        size = group.scores.numel() // group.lines
        floor = max(1, removed(self.min_keep, size))
        return max(0, min(size - floor, removed(self._largest(group), size)))

    def _largest(self, group: Group) -> float:
        if not isinstance(self.max_ratio, Mapping):
            return self.max_ratio
        names = group.layer_names
        return min((self.max_ratio[name] for name in names if name in self.max_ratio), default=1.0)

    def bounded(self, group: Group, count: int | None = None) -> int:
        """How many units go from a group when so many were to go; None: the most that ever may."""
        size, cap = group.scores.numel() // group.lines, self.cap(group)
        gone = cap if count is None else min(count // group.lines, cap)
        return group.lines * (size - min(size, -(-(size - gone) // self.round_to) * self.round_to))


@dataclass(frozen=True)
class Ranking:
    """The units of every group in the order in which they go.

    Attributes:
        groups: what was ranked.
        limits: what bounds the counts.
        orders: per group, unit indices, the first to go first.
        asked: fraction of the request -> units that would go from each group, at most its cap for ranked groups.
        steps: fractions `t / steps` for integer t tell all counts apart.
        values: scope=global: per group, the compared scores in its order.
    """

    groups: tuple[Group, ...]
    limits: Limits
    orders: tuple[np.ndarray, ...]
    asked: Callable[[Fraction], list[int]]
    steps: int
    values: tuple[Tensor, ...] = ()

    def counts(self, fraction: Fraction) -> list[int]:
        """Units to remove from each group, with floors, caps and rounding."""
        return [
            self.limits.bounded(group, count) for group, count in zip(self.groups, self.asked(fraction), strict=True)
        ]

    def keep(self, counts: Sequence[int]) -> list[Tensor]:
        """One bool vector per group, True = keep, without the first `counts[i]` units of its order."""
        keeps = []
        for group, order, count in zip(self.groups, self.orders, counts, strict=True):
            keep = torch.ones(group.scores.numel(), dtype=torch.bool)
            keep[torch.from_numpy(order[:count])] = False
            keeps.append(keep.to(group.scores.device))
        return keeps

    def bound(self, fraction: Fraction) -> list[str]:
        """Names of the groups from which more would go, were it not for a floor or cap."""
        caps = [group.lines * self.limits.cap(group) for group in self.groups]
        if not self.values:
            pairs = zip(self.groups, self.asked(fraction), caps, strict=True)
            return [group.name for group, count, cap in pairs if count > cap]
        taken = [min(count, cap) for count, cap in zip(self.asked(fraction), caps, strict=True)]
        worst = max((float(value[count - 1]) for value, count in zip(self.values, taken, strict=True) if count),
                    default=-float("inf"))  # fmt: skip
        everything = sum(taken) == sum(caps)
        return [
            group.name
            for group, value, count, cap in zip(self.groups, self.values, taken, caps, strict=True)
            if count == cap < len(value) and (float(value[cap]) < worst or (everything and fraction > 0))
        ]


def smallest(groups: Sequence[Group], limits: Limits) -> list[int]:
    """The most units that may ever go from each group."""
    return [limits.bounded(group) for group in groups]


def even(groups: Sequence[Group]) -> list[Group]:
    """The groups with every ratio 1: a fraction of their request is then one common ratio for all."""
    return [
        replace(group, ratio=1.0, votes=tuple(replace(vote, ratio=1.0) for vote in group.votes)) for group in groups
    ]


def laid_out(groups: Sequence[Group], scope: Scope | None) -> list[Group]:
    """The groups in the lines in which their units compete under a scope: rows, or whole groups."""
    return [replace(group, lines=group.rows.count if scope == "row" and group.rows else 1) for group in groups]


def rank(
    groups: Sequence[Group],
    scope: Scope,
    normalize: Normalize,
    limits: Limits,
    *,
    power: int = 1,
    never_empty: bool = False,
) -> Ranking:
    """Sorts the units of every group by score, ties by index.

    Args:
        groups: all with votes or all without.
        scope: ratios refer to each output row, to each group (or voting layer) by itself, or to all units (or voting
            channels) together.
        normalize: what makes scores of different layers comparable, for scope=global.
        power: scores are magnitudes to this power; see `normalized`.
        never_empty: for scope=global: ranking stops as a whole where the first group would lose its last unit.
    """
    found = tuple(laid_out(groups, scope))
    if any(group.votes for group in found):
        return _by_votes(found, scope, normalize, limits, power)
    orders = tuple(_order(group) for group in found)
    sizes = [group.scores.numel() for group in found]
    if scope != "global" or not found:
        ratios = [Fraction(str(group.ratio)) for group in found]
        lengths = [size // group.lines for group, size in zip(found, sizes, strict=True)]

        def each(fraction: Fraction) -> list[int]:
            return [
                group.lines * removed(ratio * fraction, length)
                for group, ratio, length in zip(found, ratios, lengths, strict=True)
            ]

        return Ranking(found, limits, orders, each, max(lengths, default=1) ** 2)
    values = tuple(
        _compared(group, normalize, power).cpu()[torch.from_numpy(order)]
        for group, order in zip(found, orders, strict=True)
    )
    caps = [limits.cap(group) for group in found]
    queues = _queues([value[:cap] for value, cap in zip(values, caps, strict=True)])
    total, ratio = sum(sizes), Fraction(str(found[0].ratio))
    last = min(int(queue[-1]) for queue in _queues(list(values))) if never_empty else total

    def together(fraction: Fraction) -> list[int]:
        budget = min(removed(ratio * fraction, total), last)
        return [int(np.searchsorted(queue, budget)) for queue in queues]

    return Ranking(found, limits, orders, together, total, values)


def _order(group: Group) -> np.ndarray:
    """The units from the lowest score up; of lines the lowest of each first, then the second lowest, and so on."""
    scores = group.scores.flatten()
    if group.lines == 1 or group.rows is None:
        return torch.sort(scores, stable=True).indices.cpu().numpy()
    rows = group.rows.positions().to(scores.device)
    return rows.gather(1, torch.sort(scores[rows], dim=1, stable=True).indices).t().flatten().cpu().numpy()


def _compared(group: Group, normalize: Normalize, power: int) -> Tensor:
    """A group's scores as they are compared with those of other groups."""
    return normalized(group.scores.flatten(), "none" if group.comparable else normalize, power)


def _queues(values: Sequence[Tensor]) -> list[np.ndarray]:
    """Per group, the positions of its ascending values in the common ascending order; ties by group, then index."""
    joined = torch.cat(list(values))
    position = np.empty(len(joined), dtype=np.int64)
    position[torch.sort(joined, stable=True).indices.numpy()] = np.arange(len(joined))
    return np.split(position, np.cumsum([len(value) for value in values])[:-1])


def _by_votes(groups: tuple[Group, ...], scope: Scope, normalize: Normalize, limits: Limits, power: int) -> Ranking:
    """Every layer votes for the lowest of its own channels, or all together; a unit goes when all its channels do."""
    offsets = np.cumsum([0, *(group.scores.numel() for group in groups)])
    votes = [(vote, offset) for group, offset in zip(groups, offsets, strict=False) for vote in group.votes]
    names = list(dict.fromkeys(vote.layer for vote, _ in votes))
    layer = np.concatenate([np.full(len(vote.scores), names.index(vote.layer)) for vote, _ in votes])
    unit = np.concatenate([vote.units.cpu().numpy() + offset for vote, offset in votes])
    scores = torch.cat([vote.scores.double().cpu() for vote, _ in votes])
    ratios = [next(Fraction(str(vote.ratio)) for vote, _ in votes if vote.layer == name) for name in names]
    if scope == "global":
        how: Normalize = "none" if all(group.comparable for group in groups) else normalize
        for index in range(len(names)):
            mine = torch.from_numpy(layer == index)
            scores[mine] = normalized(scores[mine], how, power).double()
        layer, ratios = np.zeros_like(layer), ratios[:1]
    sizes = np.bincount(layer)
    place = np.empty(len(layer), dtype=np.int64)  # rank of a channel among those of its layer
    for index, size in enumerate(sizes):
        own = np.flatnonzero(layer == index)
        order = torch.sort(scores[torch.from_numpy(own)], stable=True).indices.numpy()
        place[own[order]] = np.arange(size)
    units = int(offsets[-1])

    def asked(fraction: Fraction) -> list[int]:
        budgets = np.array([removed(ratio * fraction, int(size)) for ratio, size in zip(ratios, sizes, strict=True)])
        stays = np.bincount(unit, weights=place >= budgets[layer], minlength=units) > 0
        return [int((~part).sum()) for part in np.split(stays, offsets[1:-1])]

    # The fraction at which a unit goes: the largest of its channels'.
    asking = np.array([float(ratio) * size for ratio, size in zip(ratios, sizes, strict=True)])
    with np.errstate(divide="ignore"):
        level = (place + 1) / asking[layer]
    goes = np.zeros(units)
    np.maximum.at(goes, unit, level)
    orders = tuple(np.argsort(part, kind="stable") for part in np.split(goes, offsets[1:-1]))
    return Ranking(groups, limits, orders, asked, int(np.max(sizes) if scope == "global" else np.max(sizes) ** 2))


def normalized(scores: Tensor, how: Normalize, power: int = 1) -> Tensor:
    """Scores of one layer made comparable with other layers'; all four keep the order inside the layer.

    lamp divides each magnitude's square by the sum of the squares that are not smaller (arXiv:2010.07611, eq. 4), so
    every layer's largest is 1.

    Args:
        power: the scores are magnitudes to this power.
    """
    if how == "layer_mean":
        return scores / scores[scores.isfinite()].abs().mean().clamp_min(1e-30)
    if how == "layer_l2":
        return scores / scores[scores.isfinite()].norm().clamp_min(1e-30)
    if how == "lamp":
        ordered, order = torch.sort(scores.double(), stable=True)
        squares = ordered.clamp_min(0).pow(2 / power)
        left = squares.flip(0).cumsum(0).flip(0)
        lamp = torch.empty_like(squares)
        lamp[order] = torch.where(ordered.isfinite(), squares / left.clamp_min(1e-300), ordered)
        return lamp
    return scores
