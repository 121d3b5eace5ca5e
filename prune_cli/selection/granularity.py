"""The typed keys that all granularities share, and the groups of units they choose from.

A granularity option names its `units`: an object with `groups(context)` that says which weights live or die together.
How many go is decided here, from ratios, scope and floors; which go, by the scores.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.scoring import try_out
from prune_cli.errors import ConfigError, nearest
from prune_cli.granularities.units import (
    Constraint,
    Context,
    Dependency,
    FindPlan,
    Normalize,
    Ratio,
    Units,
    adopted,
    check_declared,
)
from prune_cli.masks import Masks
from prune_cli.measure.storage import MaskFormat
from prune_cli.selection import budget as budgets
from prune_cli.selection import targets
from prune_cli.selection.budget import Budget
from prune_cli.selection.ranking import Limits, Scope, laid_out
from prune_cli.selection.targets import Rule
from prune_cli.structure import prunable
from prune_cli.structure.follow import analyse
from prune_cli.structure.prunable import bare, layers, target

log = logging.getLogger(__name__)

Part = Annotated[float, Field(gt=0, le=1)]
"""Fraction in (0, 1]."""


@dataclass(frozen=True)
class Granularity:
    """A granularity option: the units and how many of them go.

    Attributes:
        units: which weights live or die together.
        ratio: fraction of the units to remove, in [0, 1).
        rules: layers and their ratios; see `targets.Rule`. Empty: `ratio` for every layer.
        ratio_file: YAML of ratios by parameter name, instead of rules.
        scope: rank units inside each layer, inside each output row of one, or over the whole network; None = over the whole
            network where a budget lets scores be weighed against what units cost (normalize=per_cost), else each layer.
        normalize: what scores are divided by before ranking over the whole network; None = see `normalization`.
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
    scope: Scope | None = None
    normalize: Normalize | None = None
    min_keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_ratio: Part | dict[str, Part] = 1.0
    round_to: Annotated[int, Field(ge=1)] = 1
    budget: Budget | None = None
    dependency: Dependency = "group"
    shrink: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", adopted(self.units))
        if self.scope is None:
            object.__setattr__(self, "scope", "global" if self._weighs_costs else "layer")

    @property
    def _weighs_costs(self) -> bool:
        """Whether what a unit is worth can be weighed against what it saves of a budget."""
        counted = self.budget is not None and self.budget.quantity != "latency_ms"
        return counted and self.units.has_parts and self.dependency != "union_keep"

    @property
    def limits(self) -> Limits:
        """What bounds the number of units that go from one layer."""
        return Limits(self.min_keep, self.max_ratio, self.round_to)

    def normalization(self, criterion: Criterion) -> Normalize:
        """What makes scores of different layers comparable, where a recipe does not say.

        Under a budget what a unit holds of its layers per multiply-add or parameter that it saves. Else sums over units of
        several weights are divided by the layer's mean, as layers differ in how many weights a unit has; scores of whole
        channels, as slimming's, and of single weights are compared as they are.
        """
        if self.normalize is not None or self.scope != "global":
            return self.normalize or "none"
        if self._weighs_costs:
            return "per_cost"
        return "none" if criterion.level == "channel" else self.units.compared

    def ratios(self, model: nn.Module) -> dict[str, float | str]:
        """The ratio asked of each weight, by parameter name."""
        return targets.ratios(model, self.ratio, self.rules, self.ratio_file)

    def asked(self, model: nn.Module, criterion: Criterion, plan: FindPlan) -> dict[str, float | str]:
        """`ratios`, with those of parameters that make channels without being a layer's weight (bare ones, and those of
        classes unknown to torch), where units are channels and the criterion can score any parameter."""
        scorable = all(
            need.source in ("gradient", "per_image") and need.shape == "weight" for need in criterion.entries
        )
        if not (self.units.asks_bare and scorable):
            return self.ratios(model)
        return targets.ratios(model, self.ratio, self.rules, self.ratio_file, bare(model, plan()))

    def forms(
        self, model: nn.Module, masks: Masks, asked: Mapping[str, float | str] | None = None
    ) -> dict[str, MaskFormat]:
        """How each of the masks that these units made is stored; `asked`: the ratios where they are known already."""
        known = self.units.forms(model, self.ratios(model) if asked is None else asked)
        return {name: known.get(name, MaskFormat()) for name in masks}

    def named(self, model: nn.Module, asked: Mapping[str, float | str]) -> frozenset[str]:
        """The weights among those asked for that rules or a file ask for by name, not only by type."""
        rules = [rule for rule in self.rules if rule.exclude or rule.names is not None or rule.names_re is not None]
        if not self.ratio_file and not any(not rule.exclude for rule in rules):
            return frozenset()
        own = frozenset(asked) - frozenset(prunable.targets(model))
        return frozenset(targets.ratios(model, self.ratio, rules, self.ratio_file, own)) & frozenset(asked)

    def split(
        self, model: nn.Module, asked: Mapping[str, float | str] | None = None
    ) -> tuple[Granularity, tuple[Constraint, ...]]:
        """For ADMM: the granularity whose masks lie in all constraint sets, and the sets; most have just themselves.

        What a set takes from weights (the patterns of a library) is taken from the network as it is, once and for all.
        """
        units, sets = self.units.constraints(model, self.ratios(model) if asked is None else asked)
        return replace(self, units=units), sets

    def complete(
        self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None
    ) -> dict[str, Tensor]:
        """The masks with those of the parameters that only serve what is masked, where these units leave any."""
        return self.units.complete(model, example_inputs, masks, plan)

    def check(
        self, model: nn.Module, criterion: Criterion, example_inputs: Any = None, plan: FindPlan | None = None
    ) -> None:
        """Refuses what makes no sense for this network and criterion.

        Args:
            example_inputs: one image; with it the network's structure is looked at too: what it changes about the
                request is logged, and a budget that no selection can meet is refused.
            plan: gives the channel plan of the network for these inputs, where somebody keeps it.

        Raises:
            ConfigError: says why and what would be legal.
        """
        looks = example_inputs is not None and bool(self.budget or self.units.coupled)
        if looks and plan is None:
            plan = functools.cache(functools.partial(analyse, model, example_inputs))
        asked = self.ratios(model) if not looks or plan is None else self.asked(model, criterion, plan)
        if not asked and (self.rules or self.ratio_file):
            raise ConfigError(
                "granularity: no layer is left to prune; layers that no rule or line of the file asks for stay whole, so "
                "begin with a rule for all: rules=[{types: [default]}, {names: [...], exclude: true}]"
            )
        if self.scope == "global" and len(set(asked.values())) > 1:
            raise ConfigError(
                "granularity.scope=global ranks all layers together: some may be left out, but none has a ratio of its own"
            )
        self._check_scope(criterion)
        if isinstance(self.max_ratio, dict):
            found = layers(model)
            for name in self.max_ratio:
                if name not in found:
                    raise ConfigError(f"granularity.max_ratio: no layer {name!r}{nearest(name, found)}")
        if self.dependency != "group" and not self.units.coupled:
            raise ConfigError(
                f"granularity.dependency={self.dependency} is about channels that shrink together; "
                "it needs granularity=filter"
            )
        if self.budget:
            budgets.check_legal(self.budget, self.units, self.ratio_file is not None or any(
                rule.ratio is not None for rule in self.rules))  # fmt: skip
        if self.shrink and not self.units.shrinks:
            raise ConfigError(
                "granularity.shrink=true, but units of this granularity can only be masked; choose granularity=filter, "
                "stripe or shrink=false"
            )
        computed = [name for name in asked if not target(model, name).is_parameter]
        if computed and not self.units.coupled:
            raise ConfigError(
                f"{computed[0]} is computed from other parameters (weight_norm, a parametrization), so single weights of it "
                "cannot be masked; choose granularity=filter, or exclude the layer by a rule"
            )
        check_declared(self.units, asked, criterion)
        self.units.check(model, asked, criterion)
        if asked:
            try_out(criterion, model, next(iter(asked)))
        if not looks:
            return
        blank = {name: torch.zeros(()).expand(target(model, name).weight.shape) for name in asked}
        context = Context(model, example_inputs, blank, asked, {}, self.dependency, plan)
        lines = self.units.explain(context, self.named(model, asked))
        for line in lines:
            log.warning("%s", line)
        if self.budget:
            groups = laid_out(self.units.groups(context), self.scope)
            if self.units.shrinks and not groups and self.budget.below_all:
                raise budgets.unreachable(self.budget, lines[-1] if lines else "no layer can shrink")
            budgets.check_reachable(self.budget, groups, self.limits, model, example_inputs)

    def _check_scope(self, criterion: Criterion) -> None:
        """Refuses a scope that the units do not have, and a normalisation that means nothing for it or the scores."""
        if self.scope != "global" and self.normalize not in (None, "none"):
            raise ConfigError(f"granularity.normalize={self.normalize} compares layers; it needs scope=global")
        if self.scope == "row" and not self.units.has_rows:
            raise ConfigError(
                f"granularity.scope=row compares single weights inside each output row, not {self.units.name} units; choose "
                "granularity=element, or scope=layer"
            )
        if self.normalize == "per_cost" and not self._weighs_costs:
            raise ConfigError(
                "granularity.normalize=per_cost weighs channels against what they save of a budget; it needs "
                "granularity=filter, granularity.budget={macs: ...} or {params: ...}, and dependency=group or inner_only"
            )
        if self.normalize == "lamp" and criterion.nature.power is None and not criterion.nature.drawn:
            raise ConfigError(
                "granularity.normalize=lamp is defined for magnitudes, which this criterion's scores are not; choose "
                "criterion=l1, l2 or bn_scale, or normalize=layer_mean"
            )
