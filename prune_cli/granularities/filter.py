"""Whole filters: output channels with everything that depends on them, by the channel plan of the network."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.errors import ConfigError
from prune_cli.granularities.units import Context, FindPlan, Group, Structure, Units, Vote
from prune_cli.masks import Masks
from prune_cli.measure.storage import MaskFormat
from prune_cli.structure import slicing, surgery
from prune_cli.structure.follow import analyse
from prune_cli.structure.lineage import Shrunk
from prune_cli.structure.plan import Family, Plan
from prune_cli.structure.prunable import computed_weight, is_table, owner, target
from prune_cli.structure.whole import in_words, whole

Reduce = Literal["sum", "mean", "max", "first", "product"]


@dataclass(frozen=True)
class Filter(Units):
    """Coupled output channels are one unit; a group is a family: all channels that must shrink together.

    Masks zero the producers' rows, biases and norm parameters and the consumers' columns, so the masked network
    computes what the shrunk one will.

    Attributes:
        reduce: how the scores of a unit's layers become one, where they do not vote: sum, mean, max or product over
            the layers, or that of the first layer in the order of the parameters.
    """

    name: ClassVar[str] = "filter"
    level: ClassVar[Literal["element", "channel"]] = "channel"
    budgets: ClassVar[tuple[str, ...]] = ("macs", "params", "latency_ms")
    coupled: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True
    has_parts: ClassVar[bool] = True
    asks_bare: ClassVar[bool] = True

    reduce: Reduce = "sum"

    def groups(self, context: Context) -> list[Group]:
        """One group per family whose layers were all asked for.

        Layers that share one score get the smallest of their ratios; layers that vote keep their own.
        """
        plan = context.plan
        return [self._group(context, plan, family) for family in plan.families if _state(context, family) == "shrinks"]

    def explain(self, context: Context, named: frozenset[str]) -> list[str]:
        """Says which coupled layers stay whole or share a ratio, and which layers asked by name cannot shrink."""
        plan = context.plan
        lines, served = [], set()
        for family in plan.families:
            names = _members(context, family)
            asked = [name for name in names if context.ratios.get(name)]
            state = _state(context, family)
            if state == "shrinks":
                served.update(names)
            elif state == "incomplete" and asked:
                others = [name for name in names if name not in context.ratios]
                lines.append(
                    f"{_list(asked)}: stay whole, as they shrink only together with {_list(others)}, not asked for"
                )
                served.update(asked)
            ratios = sorted({float(context.ratios[name]) for name in names if name in context.ratios})
            if state == "shrinks" and len(ratios) > 1 and context.dependency == "group":
                lines.append(f"{_list(names)}: coupled, the smallest of their ratios holds for all: {ratios[0]}")
        left = [name for name in context.ratios if name in named and name not in served and context.ratios[name]]
        if left:
            why = " or are coupled (dependency=inner_only)" if context.dependency == "inner_only" else ""
            lines.append(f"{_list(left)}: asked for by name, but their outputs cannot shrink{why}; they stay whole")
        return lines + _shortfall(context, plan)

    def _group(self, context: Context, plan: Plan, family: Family) -> Group:
        names = _members(context, family)
        dead = ~_alive(context, plan, family)
        scores = _reduced([_pooled(context, plan, place) for place in _places(context, family)], family, self.reduce)
        scores = scores.masked_fill(dead[torch.from_numpy(family.units)], float("-inf"))
        return Group(
            family.name,
            scores,
            min(float(context.ratios[name]) for name in names),
            functools.partial(_masks, context.model, plan, family),
            layers=tuple(map(owner, names)),
            votes=_votes(context, plan, family, dead) if context.dependency == "union_keep" else (),
            structure=Structure(plan, family.units),
            parts=functools.partial(_parts, context, plan, family),
        )

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, MaskFormat]:
        """A smaller dense tensor, and one bit per channel: of weights, and of the biases and norms that go along."""
        return {name: MaskFormat("filters") for name, _ in model.named_parameters()}

    def shrink(self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None) -> Shrunk:
        """The network without the channels of which the masks leave nothing."""
        found = plan() if plan else analyse(model, example_inputs)
        return surgery.remove_units(model, found, kept_units(model, found, masks))


def kept_units(model: nn.Module, plan: Plan, masks: Masks) -> np.ndarray:
    """Which units have anything left, in any of their parameters: one bool per unit id."""
    keep = np.zeros(plan.size, dtype=bool)
    parameters = dict(model.named_parameters())  # a tensor that layers share has one mask
    for name, axes in plan.axes.items():
        if name not in parameters:
            continue
        alive = masks.get(name)
        for axis, ids in axes.items():
            if alive is None:
                keep[ids] = True
                continue
            shape = parameters[name].shape
            lines = alive.reshape((1,) * (len(shape) - alive.dim()) + alive.shape).movedim(axis, 0)
            keep[ids[lines.reshape(len(lines), -1).any(1).expand(shape[axis]).cpu().numpy()]] = True
    keep[0] = True
    return keep


def _shortfall(context: Context, plan: Plan) -> list[str]:
    """One line where nothing, or less than half of what was asked for and is no output of the network, can go."""
    asked = {name for name, ratio in context.ratios.items() if ratio}
    going = sum(
        int(np.isin(plan.axes[name][axis], family.units).sum())
        for family in plan.families
        if _state(context, family) == "shrinks" and len(family.units) > 1
        for weight, name, axis in _places(context, family)
        if weight in asked
    )
    everything = context.prunable <= asked

    def others(name: str) -> bool:
        return name not in context.prunable and not is_table(context.model, name)

    stay = [
        one
        for one in whole(plan, context.prunable)
        if not one.output and (one.name in asked or (everything and others(one.name)))
    ]
    could = going + sum(one.channels for one in stay)
    if not (asked or everything) or (going and (context.dependency == "inner_only" or 2 * going >= could)):
        return []
    what = f"only {going} of {could} channels can go" if going else "nothing can be removed"
    if stay:
        return [f"{what}; these stay whole: {in_words(stay)}"]
    if not context.prunable and not context.bare:
        return [f"{what}: there is no convolution, no linear layer and no other parameter that makes channels"]
    return [f"{what}: all other channels are the network's outputs, or coupled with layers that stay"]


Place = tuple[str, str, int]
"""A layer's weight, the parameter that it is (or is computed from), and the axis of both along which units lie."""


def _places(context: Context, family: Family) -> list[Place]:
    """The family's producers that can be asked for: layers, which others follow, or else bare parameters."""
    places: dict[tuple[str, int], Place] = {}
    for name, axis in family.producers:
        weight = name if name in context.prunable else computed_weight(name)
        if weight in context.prunable and (weight == name or axis == target(context.model, weight).axis):
            places.setdefault((weight, axis), (weight, name, axis))
    if not places:
        places = {(n, axis): (n, n, axis) for n, axis in family.producers if axis in context.bare.get(n, ())}
    return list(places.values())


def _members(context: Context, family: Family) -> list[str]:
    return list(dict.fromkeys(weight for weight, _, _ in _places(context, family)))


def _state(context: Context, family: Family) -> Literal["shrinks", "incomplete", "fixed"]:
    names = _members(context, family)
    if not names or (context.dependency == "inner_only" and len({name for name, _ in family.producers}) > 1):
        return "fixed"
    return "shrinks" if all(name in context.ratios for name in names) else "incomplete"


def _list(names: Sequence[str]) -> str:
    short = [owner(name) for name in names]
    return ", ".join(short[:6]) + (f" and {len(short) - 6} more" if len(short) > 6 else "")


def _channels(context: Context, name: str, axis: int) -> Tensor:
    """Scores per position of an axis: element scores summed over everything else; channel scores as they are."""
    scores = context.scores[name]
    flat = scores if scores.dim() == 1 else scores.movedim(axis, 0).flatten(1).sum(1)
    if len(flat) != target(context.model, name).weight.shape[axis]:
        raise ConfigError(f"criterion: {len(flat)} channel scores of {name} for axis {axis} of its weight")
    return flat.double().cpu()


def _pooled(context: Context, plan: Plan, place: Place) -> Tensor:
    """Scores by unit id: the sum over the unit's positions in one layer."""
    weight, name, axis = place
    ids = torch.from_numpy(plan.axes[name][axis])
    return torch.zeros(plan.size, dtype=torch.double).index_add_(0, ids, _channels(context, weight, axis))


def _parts(context: Context, plan: Plan, family: Family) -> Tensor:
    """(members, units) scores of a family in every layer that makes its channels or reads them, where they were asked for.

    Consumers count where weights have scores of their own, not where channels have.
    """
    units = torch.from_numpy(family.units)
    rows = [_pooled(context, plan, place)[units] for place in _places(context, family)]
    for name, axis in family.consumers:
        scores = context.scores.get(name if name in context.prunable else computed_weight(name))
        ids = torch.from_numpy(plan.axes[name][axis])
        if scores is not None and scores.dim() > 1 and scores.shape[axis] == len(ids):
            columns = scores.movedim(axis, 0).flatten(1).sum(1).double().cpu()
            rows.append(torch.zeros(plan.size, dtype=torch.double).index_add_(0, ids, columns)[units])
    return torch.stack(rows)


def _reduced(members: Sequence[Tensor], family: Family, how: Reduce) -> Tensor:
    """(units,) scores of a family from those of its layers."""
    stacked = torch.stack([scores[torch.from_numpy(family.units)] for scores in members])
    if how == "first":
        return stacked[0]
    if how == "max":
        return stacked.amax(0)
    if how == "product":
        return stacked.prod(0)
    return stacked.sum(0) if how == "sum" else stacked.mean(0)


def _votes(context: Context, plan: Plan, family: Family, dead: Tensor) -> tuple[Vote, ...]:
    index = np.full(plan.size, -1)
    index[family.units] = np.arange(len(family.units))
    votes = []
    for weight, name, axis in _places(context, family):
        ids = plan.axes[name][axis]
        here = torch.from_numpy(np.flatnonzero(index[ids] >= 0))
        scores = _channels(context, weight, axis)[here].masked_fill(dead[torch.from_numpy(ids)][here], float("-inf"))
        units = torch.from_numpy(index[ids])[here]
        votes.append(Vote(owner(weight), units, scores, float(context.ratios[weight])))
    return tuple(votes)


def _alive(context: Context, plan: Plan, family: Family) -> Tensor:
    """Which units are not masked away already, by unit id: those with a producer row that has something left."""
    places = [(slicing.magnitude_of(name) or name, axis) for name, axis in family.producers]  # where masks are
    places = [place if place[0] in plan.axes else one for place, one in zip(places, family.producers, strict=True)]
    masked = [(name, axis) for name, axis in places if name in context.masked]
    if not masked:
        return torch.ones(plan.size, dtype=torch.bool)
    alive = torch.zeros(plan.size, dtype=torch.bool)
    for name, axis in masked:
        weight = context.model.get_parameter(name)
        rows = context.masked[name].to(weight.device).expand(weight.shape).movedim(axis, 0).flatten(1).any(1).cpu()
        alive[torch.from_numpy(plan.axes[name][axis])[rows]] = True
    return alive


def _masks(model: nn.Module, plan: Plan, family: Family, keep: Tensor) -> dict[str, Tensor]:
    chosen: np.ndarray = plan.everything()
    chosen[family.units] = keep.cpu().numpy()
    return slicing.structured_masks(model, plan, chosen)
