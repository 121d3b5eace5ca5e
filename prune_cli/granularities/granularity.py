"""The typed keys that all granularities share, and the groups of units they choose from.

A granularity option names its `units`: an object with `groups(context)` that says which weights live or die together.
How many go is decided here, from ratios, scope and floors; which go, by the scores.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli import channels, surgery
from prune_cli.criteria import sites
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.scoring import score_of, try_out
from prune_cli.errors import ConfigError, ScheduleError, nearest
from prune_cli.granularities import budget as budgets
from prune_cli.granularities import targets
from prune_cli.granularities.allot import Dependency, Group, Limits, Normalize, Ranking, Scope, even, rank
from prune_cli.granularities.allot import normalized as normalized
from prune_cli.granularities.budget import Budget
from prune_cli.granularities.storage import Form
from prune_cli.granularities.targets import Ratio, Rule
from prune_cli.masks import Masks
from prune_cli.plan import Plan
from prune_cli.shrinking import Shrinks

log = logging.getLogger(__name__)

FindPlan = Callable[[], Plan]
"""Gives the channel plan of a network that is analysed once for many choices."""

Part = Annotated[float, Field(gt=0, le=1)]
"""Fraction in (0, 1]."""


@dataclass(frozen=True)
class Context:
    """What a granularity needs to form its groups.

    Attributes:
        model: the network.
        example_inputs: one image, for granularities that analyse shapes.
        scores: parameter name -> element scores shaped like the weight, or (out_channels,) channel scores.
        ratios: parameter name -> ratio asked, or an `mXnY` pattern.
        masked: masks that hold already and stay (their units rank lowest), or empty.
        dependency: how coupled layers decide together, for granularities whose units are coupled.
        find_plan: gives the network's channel plan, where somebody keeps it; see `plan`.
    """

    model: nn.Module
    example_inputs: Tensor
    scores: Mapping[str, Tensor]
    ratios: Mapping[str, float | str]
    masked: Masks
    dependency: Dependency = "group"
    find_plan: FindPlan | None = None

    @functools.cached_property
    def plan(self) -> Plan:
        """The channel plan of the network, analysed where nobody keeps it."""
        return self.find_plan() if self.find_plan else channels.analyse(self.model, self.example_inputs)

    @functools.cached_property
    def prunable(self) -> frozenset[str]:
        """Names of all weights that could be asked for."""
        return frozenset(f"{name}.weight" for name in targets.layers(self.model))


class Units(Protocol):
    """One granularity: which weights live or die together."""

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """Refuses combinations that make no sense, with a ConfigError, before anything is trained."""

    def groups(self, context: Context) -> list[Group]:
        """The groups of units with their scores."""


@runtime_checkable
class Coupled(Protocol):
    """Units that span several layers, so that a request for one layer concerns others."""

    def explain(self, context: Context, named: frozenset[str]) -> list[str]:
        """What the network's structure changes about the request, one line each; `named`: weights asked by name."""


@runtime_checkable
class Formed(Protocol):
    """Units whose masks are stored in other ways than weight by weight."""

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, Form]:
        """How masks are stored, by parameter name; others are stored as single weights."""


@dataclass(frozen=True)
class Constraint:
    """One of the sets that masked weights must lie in; ADMM projects onto each by itself.

    Attributes:
        name: for tables.
        units: whose masks are the projection.
        criterion: whose scores choose them, where only a certain one's do; None = the run's.
    """

    name: str
    units: Units
    criterion: Criterion | None = None


@runtime_checkable
class Intersection(Protocol):
    """Units whose masks lie in several sets at once, each of which is easy to project onto."""

    def constraints(self, model: nn.Module, ratios: Mapping[str, float | str]) -> tuple[Units, tuple[Constraint, ...]]:
        """Units that choose masks in all sets, and the sets; what depends on weights is that of the network as it is."""


@runtime_checkable
class Silences(Protocol):
    """Units whose masks leave constants behind that must go too, for the masked network to equal the shrunk one."""

    def complete(
        self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None
    ) -> dict[str, Tensor]:
        """The masks with those of the parameters that only serve what is masked; `plan`: see `Context`."""


@dataclass(frozen=True)
class Granularity:
    """A granularity option: the units and how many of them go.

    Attributes:
        units: which weights live or die together.
        ratio: fraction of the units to remove, in [0, 1).
        rules: layers and their ratios; see `targets.Rule`. Empty: `ratio` for every layer.
        ratio_file: YAML of ratios by parameter name, instead of rules.
        scope: rank units inside each layer, or over the whole network.
        normalize: what scores are divided by before ranking over the whole network.
        min_keep: fraction of a layer's units that always stays, rounded down; at least one unit does.
        max_ratio: largest fraction that may be removed from one layer, or a mapping from layer name to it.
        round_to: the units kept are rounded up to a multiple of this, at most to all that there are.
        budget: what may remain, instead of `ratio`.
        dependency: how coupled layers decide together, where units are coupled: group = they share one score;
            union_keep = a unit goes only when every layer votes so; inner_only = coupled layers stay whole,
            and with scope=global a ratio removes no more once a layer would be emptied (a budget goes on elsewhere).
        shrink: take masked units out of the network when the schedule is done, where the units can be taken out.
    """

    units: Units
    ratio: Ratio = 0.5
    rules: tuple[Rule, ...] = ()
    ratio_file: Path | None = None
    scope: Scope = "layer"
    normalize: Normalize = "none"
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_ratio: Part | dict[str, Part] = 1.0
    round_to: Annotated[int, Field(ge=1)] = 1
    budget: Budget | None = None
    dependency: Dependency = "group"
    shrink: bool = False

    @property
    def limits(self) -> Limits:
        """What bounds the number of units that go from one layer."""
        return Limits(self.min_keep, self.max_ratio, self.round_to)

    def ratios(self, model: nn.Module) -> dict[str, float | str]:
        """The ratio asked of each weight, by parameter name."""
        return targets.ratios(model, self.ratio, self.rules, self.ratio_file)

    def forms(self, model: nn.Module, masks: Masks, asked: Mapping[str, float | str] | None = None) -> dict[str, Form]:
        """How each of the masks that these units made is stored; `asked`: the ratios where they are known already."""
        asked = self.ratios(model) if asked is None else asked
        known = self.units.forms(model, asked) if isinstance(self.units, Formed) else {}
        return {name: known.get(name, Form()) for name in masks}

    def named(self, model: nn.Module) -> frozenset[str]:
        """The weights that rules or a file ask for by name, not only by type."""
        rules = [rule for rule in self.rules if rule.exclude or rule.names is not None or rule.names_re is not None]
        if not self.ratio_file and not any(not rule.exclude for rule in rules):
            return frozenset()
        return frozenset(targets.ratios(model, self.ratio, rules, self.ratio_file)) & frozenset(self.ratios(model))

    def split(
        self, model: nn.Module, asked: Mapping[str, float | str] | None = None
    ) -> tuple[Granularity, tuple[Constraint, ...]]:
        """For ADMM: the granularity whose masks lie in all constraint sets, and the sets; most have just themselves.

        What a set takes from weights (the patterns of a library) is taken from the network as it is, once and for all.
        """
        if not isinstance(self.units, Intersection):
            return self, (Constraint("units", self.units),)
        units, sets = self.units.constraints(model, self.ratios(model) if asked is None else asked)
        return replace(self, units=units), sets

    def complete(
        self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None
    ) -> dict[str, Tensor]:
        """The masks with those of the parameters that only serve what is masked, where these units leave any."""
        if not isinstance(self.units, Silences):
            return dict(masks)
        return self.units.complete(model, example_inputs, masks, plan)

    def check(self, model: nn.Module, criterion: Criterion, example_inputs: Tensor | None = None) -> None:
        """Refuses what makes no sense for this network and criterion.

        Args:
            example_inputs: one image; with it the network's structure is looked at too: what it changes about the
                request is logged, and a budget that no selection can meet is refused.

        Raises:
            ConfigError: says why and what would be legal.
        """
        asked = self.ratios(model)
        if not asked and (self.rules or self.ratio_file):
            raise ConfigError(
                "granularity: no layer is left to prune; layers that no rule or line of the file asks for stay whole, so "
                "begin with a rule for all: rules=[{types: [default]}, {names: [...], exclude: true}]"
            )
        if self.scope == "global" and len(set(asked.values())) > 1:
            raise ConfigError(
                "granularity.scope=global ranks all layers together: rules may exclude, but not set ratios"
            )
        if self.scope == "layer" and self.normalize != "none":
            raise ConfigError(f"granularity.normalize={self.normalize} compares layers; it needs scope=global")
        if isinstance(self.max_ratio, dict):
            found = targets.layers(model)
            for name in self.max_ratio:
                if name not in found:
                    raise ConfigError(f"granularity.max_ratio: no layer {name!r}{nearest(name, found)}")
        if self.dependency != "group" and not isinstance(self.units, Coupled):
            raise ConfigError(
                f"granularity.dependency={self.dependency} is about channels that shrink together; "
                "it needs granularity=filter"
            )
        if self.budget:
            budgets.check_legal(self.budget, self.units, self.ratio_file is not None or any(
                rule.ratio is not None for rule in self.rules))  # fmt: skip
        if self.shrink and not isinstance(self.units, Shrinks):
            raise ConfigError(
                "granularity.shrink=true, but units of this granularity can only be masked; choose granularity=filter, "
                "stripe or shrink=false"
            )
        computed = [name for name in asked if not isinstance(targets.weight_of(model, name), nn.Parameter)]
        if computed and not isinstance(self.units, Coupled):
            raise ConfigError(
                f"{computed[0]} is computed from other parameters (weight_norm, a parametrization), so single weights of it "
                "cannot be masked; choose granularity=filter, or exclude the layer by a rule"
            )
        self.units.check(model, asked, criterion)
        if asked:
            try_out(criterion, model, next(iter(asked)))
        if example_inputs is None or not (self.budget or isinstance(self.units, Coupled)):
            return
        blank = {name: torch.zeros(()).expand(targets.weight_of(model, name).shape) for name in asked}
        context = Context(model, example_inputs, blank, asked, {}, self.dependency)
        if isinstance(self.units, Coupled):
            for line in self.units.explain(context, self.named(model)):
                log.warning("%s", line)
        if self.budget:
            budgets.check_reachable(self.budget, self.units.groups(context), self.limits, model, example_inputs)


@dataclass(frozen=True)
class Selection:
    """Chosen masks and how much they remove.

    Attributes:
        masks: parameter name -> True = keep.
        units: all units that could go.
        removed: those that do.
        requested: fraction of the units asked for; None where a budget or counts decide.
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
        return surgery.structured_masks(model, *self.candidate, producers_only=True)


def select(
    granularity: Granularity,
    criterion: Criterion,
    model: nn.Module,
    example_inputs: Tensor,
    *,
    share: float = 1.0,
    kept: Mapping[str, int] | None = None,
    masked: Masks | None = None,
    statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
    seed: int = 0,
    asked: Mapping[str, float | str] | None = None,
    plan: FindPlan | None = None,
) -> Selection:
    """Scores every unit and masks exactly the lowest k of n, ties by index.

    Args:
        share: part of the ratio to apply, in [0, 1].
        kept: instead of a share: group name -> units that stay; see `names_of`. Groups that are absent stay whole.
        masked: masks whose units stay removed, or None to choose afresh.
        statistics: parameter name -> what the criterion's needs collected.
        seed: for criteria that draw numbers; each layer has its own generator.
        asked: the granularity's ratios of this network, where they are known already.
        plan: gives the network's channel plan, where somebody keeps it.
    """
    asked = granularity.ratios(model) if asked is None else asked
    part = Fraction(str(share))
    context = Context(model, example_inputs, {}, asked, masked or {}, granularity.dependency, plan)
    groups = scored(granularity, criterion, context, statistics or {}, seed, share=part, kept=kept)
    if kept is not None:
        return chosen(model, groups, keep_counts(ordered(groups), kept), None)
    keeps = keep_units(groups, granularity, part, model, example_inputs)
    units = sum(keep.numel() for keep in keeps)
    requested = None
    if granularity.budget is None:
        requested = float(sum(group.ratio * group.scores.numel() for group in groups) / max(units, 1))
    return chosen(model, groups, keeps, requested)


def scored(
    granularity: Granularity,
    criterion: Criterion,
    context: Context,
    statistics: Mapping[str, Mapping[str, Tensor]],
    seed: int,
    *,
    share: Fraction = Fraction(1),
    kept: Mapping[str, int] | None = None,
) -> list[Group]:
    """The groups of a network with their scores.

    Args:
        context: of the network; its scores are not looked at.
        statistics: parameter name -> what the criterion's needs collected.
        seed: for criteria that draw numbers.
        share: of the ratio that will be applied, for criteria that need to know how much is kept.
        kept: group name -> units that will stay, instead of a share; for the same.
    """
    model, asked = context.model, context.ratios
    norms = sites.norms(model, context.example_inputs) if "norm" in criterion.needs else {}
    rows = rows_kept(granularity, context, share, kept) if "n_keep" in criterion.needs else {}
    scores = {
        name: score_of(
            model,
            name,
            criterion,
            statistics.get(name, {}),
            seed + index,
            norm=norms.get(name),
            n_keep=rows.get(name),
        )
        for index, name in enumerate(asked)
    }
    return granularity.units.groups(replace(context, scores=scores))


def chosen(model: nn.Module, groups: Sequence[Group], keeps: Sequence[Tensor], requested: float | None) -> Selection:
    """The selection that keeps these units of each group.

    Args:
        requested: fraction of the units asked for.
    """
    counts = [int(keep.sum()) for keep in keeps]
    units = sum(keep.numel() for keep in keeps)
    structure = groups[0].structure if groups else None
    candidate = (structure.plan, budgets.kept_units(groups, keeps)) if structure else None
    kept = dict(zip(names_of(groups), counts, strict=True))
    masks = combined(model, groups, keeps)
    return Selection(masks, units, units - sum(counts), requested, *_channels(candidate), candidate, kept)


def names_of(groups: Sequence[Group]) -> list[str]:
    """The names of groups, the second of a name as `NAME#2`: a layer's channels may lie in several coupled sets."""
    seen: Counter[str] = Counter()
    names = []
    for group in groups:
        seen[group.name] += 1
        names.append(group.name if seen[group.name] == 1 else f"{group.name}#{seen[group.name]}")
    return names


def ordered(groups: Sequence[Group]) -> Ranking:
    """The units of every group in the order in which they go, each group by itself.

    Raises:
        ScheduleError: the units are chosen by patterns, so that there is no such order.
    """
    if any(group.choose for group in groups):
        raise ScheduleError(
            "schedule: it says how many units each layer keeps, but units of this granularity are chosen by patterns; "
            "choose granularity=filter, element, kernel or stripe, or another schedule"
        )
    return rank(even(groups), "layer", "none", Limits())


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
        return surgery.structured_masks(model, groups[0].structure.plan, budgets.kept_units(groups, keeps))
    masks: dict[str, Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for name, mask in group.mask(keep).items():
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


def rows_kept(
    granularity: Granularity, context: Context, share: Fraction, counts: Mapping[str, int] | None = None
) -> dict[str, int]:
    """How many output channels each weight will keep, by name: the counts do not depend on scores inside a layer.

    A choice by equal scores is made and its masks are counted, so that coupled layers get their family's number.
    """
    model, asked = context.model, context.ratios
    blank = {name: torch.zeros(targets.weight_of(model, name).shape[sites.output_axis(model, name)]) for name in asked}
    groups = granularity.units.groups(replace(context, scores=blank))
    kept = {name: scores.numel() for name, scores in blank.items()}
    if counts is None:
        keeps = keep_units(groups, granularity, share, model, context.example_inputs)
    else:
        keeps = keep_counts(ordered(groups), counts)
    for name, mask in combined(model, groups, keeps).items():
        axis = sites.output_axis(model, name) if name in kept else 0
        if name in kept and mask.shape[axis] == kept[name]:  # masks of input channels alone have one row for all
            kept[name] = int(mask.movedim(axis, 0).flatten(1).any(1).sum())
    return kept


def keep_units(
    groups: list[Group],
    granularity: Granularity,
    share: Fraction,
    model: nn.Module | None = None,
    example_inputs: Tensor | None = None,
) -> list[Tensor]:
    """One bool vector per group, True = keep; names in the log the layers where a floor or cap acted.

    Args:
        share: part of the request to apply, in [0, 1]; of a budget, the part of the way from the whole network.
        model: needed for budgets.
        example_inputs: the same.
    """
    scope, normalize, limits = granularity.scope, granularity.normalize, granularity.limits
    if granularity.budget:
        assert model is not None and example_inputs is not None
        if not groups:
            budgets.check_reachable(granularity.budget, groups, limits, model, example_inputs)
            return []
        ranking = rank(even(groups), scope, normalize, limits)
        return ranking.keep(budgets.fit(granularity.budget, ranking, share, model, example_inputs))
    if scope == "global" and any(group.choose for group in groups):
        raise ConfigError("granularity.scope=global: these units choose inside each layer; choose scope=layer")
    ranked = [group for group in groups if not group.choose]  # sorting the others would be the dearest part
    ranking = rank(ranked, scope, normalize, limits, never_empty=granularity.dependency == "inner_only")
    counts = ranking.counts(share)
    _report(ranking, share, counts)
    keeps = iter(ranking.keep(counts))
    return _spared(groups, [group.choose(share) if group.choose else next(keeps) for group in groups])


def _spared(groups: list[Group], keeps: list[Tensor]) -> list[Tensor]:
    """One channel more where a layer that reads only a part of a coupled set would be left with none."""
    structure = groups[0].structure if groups else None
    if structure is None:
        return keeps
    scores = np.zeros(structure.plan.size)
    for group in groups:
        if group.structure is not None:
            scores[group.structure.units] = group.scores.detach().cpu().numpy()
    chosen = budgets.kept_units(groups, keeps)
    kept = torch.from_numpy(channels.spared(structure.plan, chosen, scores))
    if more := int(kept.sum()) - int(chosen.sum()):
        log.warning("%d channels more stay, so that no layer is left without any", more)
    return [
        keep if group.structure is None else kept[torch.from_numpy(group.structure.units)].to(keep.device)
        for group, keep in zip(groups, keeps, strict=True)
    ]


def _report(ranking: Ranking, share: Fraction, counts: Sequence[int]) -> None:
    """Logs where floors, caps and rounding changed what was asked."""
    sizes = [group.scores.numel() for group in ranking.groups]
    bound, rounded = ranking.bound(share), ranking.limits.round_to > 1
    if not (bound or rounded) or not share:
        return
    realised = {group.name: count / size for group, count, size in zip(ranking.groups, counts, sizes, strict=True)}
    where = ", ".join(f"{name} at {realised[name]:.3f}" for name in bound) or "no layer"
    asked = sum(float(group.ratio * share) * size for group, size in zip(ranking.groups, sizes, strict=True))
    log.info(
        "min_keep and max_ratio acted on %s%s; removed %.4f of the units, asked %.4f",
        where, f", widths are multiples of {ranking.limits.round_to}" if rounded else "",
        sum(counts) / max(sum(sizes), 1), asked / max(sum(sizes), 1),
    )  # fmt: skip
