"""Which units go: exactly the lowest k of n, or what a budget leaves."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.criteria import sites
from prune_cli.criteria.criterion import Criterion, LayerView
from prune_cli.criteria.scoring import score_of
from prune_cli.errors import ConfigError, ScheduleError, nearest
from prune_cli.granularities.units import Context, FindPlan, Group, Normalize
from prune_cli.masks import Masks
from prune_cli.selection import budget as budgets
from prune_cli.selection import per_cost
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.ranking import Limits, Ranking, Scope, even, rank
from prune_cli.structure import slicing
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import spared
from prune_cli.structure.plan import Plan
from prune_cli.structure.prunable import target

log = logging.getLogger(__name__)

ALMOST_ALL, LITTLE = 0.9, 0.2
"""A common ranking that takes more than the one of a layer and less than the other of another is worth a warning."""


@dataclass(frozen=True)
class Selection:
    """Chosen masks and how much they remove.

    Attributes:
        masks: parameter name -> True = keep.
        units: all units that could go.
        removed: those that do.
        requested: fraction of the units that the granularity asks for; None where it has a budget.
        channels: output channels of the network that could go if every layer were asked for; 0 for other units.
        channels_removed: those that do.
        candidate: the channel plan and which of its units stay, where units are channels.
        kept: group name -> units that stay; see `names_of`.
    """

    masks: dict[str, Tensor]
    units: int
    removed: int
    requested: float | None
    channels: int = 0
    channels_removed: int = 0
    candidate: tuple[Plan, np.ndarray] | None = None
    kept: Mapping[str, int] = field(default_factory=dict)

    def growing(self, model: nn.Module) -> dict[str, Tensor]:
        """The masks that zero units so that they can grow back: of channels, only the rows that produce them.

        The norms and the columns behind a channel stay as they are (arXiv:1808.06866, section 3.2): with those at zero
        too, no gradient would reach its weights.
        """
        if self.candidate is None:
            return self.masks
        return slicing.structured_masks(model, *self.candidate, producers_only=True)


def select(
    granularity: Granularity,
    criterion: Criterion,
    model: nn.Module,
    example_inputs: Tensor,
    *,
    fraction: float = 1.0,
    kept: Mapping[str, int] | None = None,
    masked: Masks | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    asked: Mapping[str, float | str] | None = None,
    plan: FindPlan | None = None,
    quiet: bool = False,
) -> Selection:
    """Scores every unit and masks exactly the lowest k of n, ties by index; says in the log what limits changed.

    Args:
        fraction: part of the ratio to apply, in [0, 1].
        kept: instead of a fraction: group name -> units that stay; see `names_of`. Groups that are absent stay whole.
        masked: masks whose units stay removed, or None to choose afresh.
        statistics: parameter name -> what the criterion's needs collected.
        seed: for criteria that draw numbers; each layer has its own generator.
        asked: the granularity's ratios of this network, where they are known already.
        plan: gives the network's channel plan, where somebody keeps it.
        quiet: whether the choice is a trial, of which the log need not say anything.
    """
    if asked is None:
        plan = plan or functools.cache(functools.partial(analyse, model, example_inputs))
        asked = granularity.asked(model, criterion, plan)
    part = Fraction(str(fraction))
    context = Context(model, example_inputs, {}, asked, masked or {}, granularity.dependency, plan)
    groups = scored(granularity, criterion, context, statistics or {}, seed, fraction=part, kept=kept)
    if kept is not None:
        return counted(granularity, model, groups, kept)
    how, power = granularity.normalization(criterion), criterion.nature.power or 1
    keeps = keep_units(groups, granularity, part, model, example_inputs, normalize=how, power=power, quiet=quiet)
    if granularity.scope == "global" and not quiet:
        _report_layers(groups, keeps, granularity.limits)
    return chosen(granularity, model, groups, keeps)


def counted(granularity: Granularity, model: nn.Module, groups: Sequence[Group], kept: Mapping[str, int]) -> Selection:
    """The selection that keeps the best so many units of each group; see `keep_counts`."""
    return chosen(granularity, model, groups, keep_counts(ordered(groups, granularity.scope), kept))


def _requested(granularity: Granularity, groups: Sequence[Group]) -> float | None:
    if granularity.budget is not None:
        return None
    sizes = [group.scores.numel() for group in groups]
    return float(sum(group.ratio * size for group, size in zip(groups, sizes, strict=True)) / max(sum(sizes), 1))


def scored(
    granularity: Granularity,
    criterion: Criterion,
    context: Context,
    statistics: Mapping[str, Mapping[str, Tensor]],
    seed: int,
    *,
    fraction: Fraction = Fraction(1),
    kept: Mapping[str, int] | None = None,
) -> list[Group]:
    """The groups of a network with their scores.

    Args:
        context: of the network; its scores are not looked at.
        statistics: parameter name -> what the criterion's needs collected.
        seed: for criteria that draw numbers.
        fraction: of the ratio that will be applied, for criteria that need to know how much is kept.
        kept: group name -> units that will stay, instead of a fraction; for the same.
    """
    model, asked = context.model, context.ratios
    norms = sites.norms(model, context.example_inputs) if criterion.reads("structure") else {}
    rows = rows_kept(granularity, context, fraction, kept) if criterion.reads("request") else {}
    scores = {
        name: score_of(
            model,
            name,
            criterion,
            statistics.get(name, {}),
            seed + index,
            norm=norms.get(name),
            n_keep=rows.get(name),
            axis=context.bare[name][0] if name not in context.prunable and name in context.bare else None,
        )
        for index, name in enumerate(asked)
    }
    groups = granularity.units.groups(replace(context, scores=scores))
    if not criterion.nature.drawn:
        return groups
    return [_drawn(group, criterion, seed + len(asked) + index) for index, group in enumerate(groups)]


def _drawn(group: Group, criterion: Criterion, seed: int) -> Group:
    """The group with a number of its own for every unit, the same for all layers that vote on it."""
    if group.choose:  # single weights, whose numbers are their own already
        return group
    size = group.scores.shape
    draws = criterion.score(LayerView(group.name, torch.zeros(size), None, torch.Generator().manual_seed(seed)))
    scores = draws.to(group.scores).masked_fill(group.scores == float("-inf"), float("-inf"))
    votes = tuple(replace(vote, scores=scores[vote.units].to(vote.scores)) for vote in group.votes)
    return replace(group, scores=scores, votes=votes, comparable=True)


def chosen(granularity: Granularity, model: nn.Module, groups: Sequence[Group], keeps: Sequence[Tensor]) -> Selection:
    """The selection that keeps these units of each group."""
    counts = [int(keep.sum()) for keep in keeps]
    units = sum(keep.numel() for keep in keeps)
    structure = groups[0].structure if groups else None
    candidate = (structure.plan, budgets.kept_in_plan(groups, keeps)) if structure else None
    kept = dict(zip(names_of(groups), counts, strict=True))
    masks = combined(model, groups, keeps)
    requested = _requested(granularity, groups)
    return Selection(masks, units, units - sum(counts), requested, *_channels(candidate), candidate, kept)


def names_of(groups: Sequence[Group]) -> list[str]:
    """The names of groups, the second of a name as `NAME#2`: a layer's channels may lie in several coupled sets."""
    seen: Counter[str] = Counter()
    names = []
    for group in groups:
        seen[group.name] += 1
        names.append(group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}")
    return names


def ordered(groups: Sequence[Group], scope: Scope | None) -> Ranking:
    """The units of every group in the order in which they go, each group by itself, or row by row under scope=row.

    Raises:
        ScheduleError: the units are chosen by patterns, so that there is no such order.
    """
    if any(group.choose for group in groups):
        raise ScheduleError(
            "schedule: it says how many units each layer keeps, but units of this granularity are chosen by patterns; "
            "choose granularity=filter, element, kernel or stripe, or another schedule"
        )
    return rank(even(groups), "row" if scope == "row" else "layer", "none", Limits())


def keep_counts(ranking: Ranking, kept: Mapping[str, int]) -> list[Tensor]:
    """One bool vector per group, True = keep, with exactly so many units of each; groups that are absent stay whole.

    Args:
        ranking: from `ordered`.
        kept: group name -> units that stay.

    Raises:
        ScheduleError: no such group, or a count that it cannot have.
    """
    groups = list(ranking.groups)
    names = names_of(groups)
    if unknown := [name for name in kept if name not in names]:
        raise ScheduleError(f"schedule: there is no group of units {unknown[0]!r}{nearest(unknown[0], names)}")
    counts = []
    for name, group in zip(names, groups, strict=True):
        size = group.scores.numel()
        alive = size - int((group.scores == float("-inf")).sum())
        count = kept.get(name, alive)
        if not min(1, alive) <= count <= alive:
            raise ScheduleError(f"schedule: {count} units of {name} cannot stay, only from 1 to {alive}")
        counts.append(size - count)
    return _spared(groups, ranking.keep(counts))


def _channels(candidate: tuple[Plan, np.ndarray] | None) -> tuple[int, int]:
    """Output channels that depend on a channel plan, and those that go."""
    if candidate is None:
        return 0, 0
    plan, keep = candidate
    producing = {place for family in plan.families for place in family.producers}
    ids = [plan.axes[name][axis] for name, axis in sorted(producing)]
    return sum(map(len, ids)), sum(int((~keep[axis[axis > 0]]).sum()) for axis in ids)


def combined(model: nn.Module, groups: Sequence[Group], keeps: Sequence[Tensor]) -> dict[str, Tensor]:
    """The masks of all groups by parameter name: an entry stays if every group that has a say in it keeps it."""
    if groups and groups[0].structure:
        return slicing.structured_masks(model, groups[0].structure.plan, budgets.kept_in_plan(groups, keeps))
    masks: dict[str, Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for name, mask in group.mask(keep).items():
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


def rows_kept(
    granularity: Granularity, context: Context, fraction: Fraction, counts: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many output channels each weight will keep, by name: the counts do not depend on scores inside a layer.

    A choice by equal scores is made and its masks are counted, so that coupled layers get their family's number.
    """
    model, asked = context.model, context.ratios
    blank = {name: torch.zeros(target(model, name).channels) for name in asked}
    groups = granularity.units.groups(replace(context, scores=blank))
    kept = {name: scores.numel() for name, scores in blank.items()}
    if counts is None:
        keeps = keep_units(groups, granularity, fraction, model, context.example_inputs, quiet=True)
    else:
        keeps = keep_counts(ordered(groups, granularity.scope), counts)
    for name, mask in combined(model, groups, keeps).items():
        axis = target(model, name).axis if name in kept else 0
        if name in kept and mask.shape[axis] == kept[name]:  # masks of input channels alone have one row for all
            kept[name] = int(mask.movedim(axis, 0).flatten(1).any(1).sum())
    return kept


def keep_units(
    groups: list[Group],
    granularity: Granularity,
    fraction: Fraction,
    model: nn.Module | None = None,
    example_inputs: Tensor | None = None,
    *,
    normalize: Normalize = "none",
    power: int = 1,
    quiet: bool = False,
) -> list[Tensor]:
    """One bool vector per group, True = keep; names in the log the layers where a floor or cap acted.

    Args:
        fraction: part of the request to apply, in [0, 1]; of a budget, the part of the way from the whole network.
        model: needed for budgets.
        example_inputs: the same.
        normalize: what makes scores of different layers comparable, for scope=global.
        power: scores are magnitudes to this power.
        quiet: whether this is a trial, of which the log need not say anything.
    """
    scope, limits = granularity.scope, granularity.limits
    assert scope is not None, "granularities know their scope from the beginning"
    if granularity.budget:
        assert model is not None and example_inputs is not None
        if not groups:
            budgets.check_reachable(granularity.budget, groups, limits, model, example_inputs)
            return []
        if normalize == "per_cost":
            groups = per_cost.positions(groups, limits, granularity.budget)
        ranking = rank(even(groups), scope, normalize, limits, power=power)
        return ranking.keep(budgets.fit(granularity.budget, ranking, fraction, model, example_inputs))
    if scope == "global" and any(group.choose for group in groups):
        raise ConfigError("granularity.scope=global: these units choose inside each layer; choose scope=layer")
    ranked = [group for group in groups if not group.choose]  # sorting the others would be the dearest part
    never_empty = granularity.dependency == "inner_only"
    ranking = rank(ranked, scope, normalize, limits, power=power, never_empty=never_empty)
    counts = ranking.counts(fraction)
    if not quiet:
        _report(ranking, fraction, counts)
    keeps = iter(ranking.keep(counts))
    return _spared(groups, [group.choose(fraction) if group.choose else next(keeps) for group in groups], quiet=quiet)


def _spared(groups: list[Group], keeps: list[Tensor], *, quiet: bool = False) -> list[Tensor]:
    """One channel more where a layer that reads only a part of a coupled set would be left with none."""
    structure = groups[0].structure if groups else None
    if structure is None:
        return keeps
    scores = np.zeros(structure.plan.size)
    for group in groups:
        if group.structure is not None:
            scores[group.structure.units] = group.scores.detach().cpu().numpy()
    chosen = budgets.kept_in_plan(groups, keeps)
    kept = torch.from_numpy(spared(structure.plan, chosen, scores))
    if (more := int(kept.sum()) - int(chosen.sum())) and not quiet:
        log.warning("%d channels more stay, so that no layer is left without any", more)
    return [
        keep if group.structure is None else kept[torch.from_numpy(group.structure.units)].to(keep.device)
        for group, keep in zip(groups, keeps, strict=True)
    ]


def _report(ranking: Ranking, fraction: Fraction, counts: Sequence[int]) -> None:
    """Logs where floors, caps and rounding changed what was asked."""
    sizes = [group.scores.numel() for group in ranking.groups]
    bound, rounded = ranking.bound(fraction), ranking.limits.round_to > 1
    if not (bound or rounded) or not fraction:
        return
    realised = {group.name: count / size for group, count, size in zip(ranking.groups, counts, sizes, strict=True)}
    where = ", ".join(f"{name} at {realised[name]:.3f}" for name in bound) or "no layer"
    asked = sum(float(group.ratio * fraction) * size for group, size in zip(ranking.groups, sizes, strict=True))
    log.info(
        "min_keep and max_ratio acted on %s%s; removed %.4f of the units, asked %.4f",
        where, f", widths are multiples of {ranking.limits.round_to}" if rounded else "",
        sum(counts) / max(sum(sizes), 1), asked / max(sum(sizes), 1),
    )  # fmt: skip


def _report_layers(groups: Sequence[Group], keeps: Sequence[Tensor], limits: Limits) -> None:
    """Logs what part of every layer a common ranking took, and warns where it took almost all of one and spared another."""
    gone = {name: 1 - int(keep.sum()) / keep.numel() for name, keep in zip(names_of(groups), keeps, strict=True)}
    log.debug("removed by layer: %s", ", ".join(f"{name} {ratio:.3f}" for name, ratio in gone.items()))
    could = [
        name for name, group in zip(gone, groups, strict=True) if limits.bounded(group) > LITTLE * group.scores.numel()
    ]
    if not could:
        return
    most, least = max(gone, key=lambda name: gone[name]), min(could, key=lambda name: gone[name])
    if gone[most] > ALMOST_ALL and gone[least] < LITTLE:
        log.warning(
            "granularity.scope=global takes %.1f %% of %s and %.1f %% of %s, as if their scores could be compared; where they "
            "cannot, choose another granularity.normalize, granularity.max_ratio=0.8 or granularity.scope=layer",
            100 * gone[most], most, 100 * gone[least], least,
        )  # fmt: skip
