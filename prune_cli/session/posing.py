"""From a network and a granularity to the `Problem` that a schedule knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.granularities.units import Context, FindPlan
from prune_cli.granularities.units import Group as Units
from prune_cli.masks import Masks
from prune_cli.measure import cost as costs
from prune_cli.measure.latency import latency
from prune_cli.schedules.problem import Arithmetic, Curve, Group, Layer, Problem, Quantity
from prune_cli.selection import latency_table
from prune_cli.selection.budget import masked_costs
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.ranking import laid_out
from prune_cli.selection.select import names_of
from prune_cli.structure.keep import removed
from prune_cli.structure.plan import Plan
from prune_cli.structure.prunable import target, targets


def pose(
    granularity: Granularity,
    model: nn.Module,
    example_inputs: Tensor,
    *,
    asked: Mapping[str, float | str],
    masked: Masks,
    tags: Sequence[str] = (),
    seed: int = 0,
    steps: int,
    plan: FindPlan | None = None,
    budget: tuple[Quantity, float] | None = None,
    learns: bool = False,
    rough: bool = False,
) -> Problem:
    """What a schedule knows of a network.

    Args:
        model: as it is now.
        asked: the granularity's ratios of this network.
        masked: masks that hold already, of an earlier stage.
        tags: snapshots that are there from the start.
        seed: of the stage.
        steps: optimizer steps of an epoch.
        plan: gives the network's channel plan, where somebody keeps it.
        budget: the quantity of the target and what may remain, where that was settled before the network shrank.
        learns: whether the criterion's scores are summed up in training.
        rough: predict times from one of the whole network, for a first look.
    """
    blank = {name: torch.zeros(()).expand(target(model, name).weight.shape) for name in asked}
    context = Context(model, example_inputs, blank, asked, masked, granularity.dependency, plan)
    groups = laid_out(granularity.units.groups(context), granularity.scope)
    cost = costs.cost(model, example_inputs, masked or None)
    facts = _layers(model, cost)
    found = tuple(_group(name, group, granularity, facts) for name, group in zip(names_of(groups), groups, strict=True))
    structure = groups[0].structure if groups else None
    if structure is None:
        arithmetic = _of_masks(groups, model, cost)
    else:
        arithmetic = _of_channels(groups, structure.plan)
        if granularity.budget is not None and granularity.budget.quantity == "latency_ms":
            arithmetic = _timed(arithmetic, structure.plan, model, example_inputs, rough)
    problem = Problem(
        groups=found,
        quantity="units",
        budget=0.0,
        arithmetic=arithmetic,
        countable=not any(group.choose for group in groups),
        shrinks=granularity.shrink and granularity.units.shrinks,
        tags=tuple(tags),
        seed=seed,
        steps=steps,
        scope=granularity.scope or "layer",
        regrows=structure is None,
        learns=learns,
    )
    quantity, allowed = budget or _target(granularity, problem, [group.lines for group in groups])
    return replace(problem, quantity=quantity, budget=allowed)


def _target(granularity: Granularity, problem: Problem, lines: Sequence[int]) -> tuple[Quantity, float]:
    """What the granularity asks for: its budget, or the units that its ratios leave within their limits."""
    if granularity.budget is not None:
        quantity = granularity.budget.quantity
        whole = {group.name: group.units for group in problem.groups}
        return quantity, float(granularity.budget.allowed(Fraction(1), problem.cost(whole, quantity)))
    units = sum(group.units for group in problem.groups)
    if granularity.scope == "global" and problem.groups:
        most = sum(group.units - group.least for group in problem.groups)
        return "units", units - min(removed(problem.groups[0].ratio, units), most)
    return "units", sum(
        max(group.units - rows * removed(group.ratio, group.units // rows), group.least)
        for group, rows in zip(problem.groups, lines, strict=True)
    )


def _layers(model: nn.Module, cost: costs.Cost) -> dict[str, tuple[int, Layer]]:
    """Every layer that can be pruned by its name, with its place among them."""
    counted = {layer.name: layer for layer in cost.layers}
    found = {}
    for depth, one in enumerate(targets(model).values()):
        name, module = one.layer, one.module
        stride = getattr(module, "stride", 1)
        layer = counted.get(name)
        found[name] = (
            depth,
            Layer(
                name,
                type(module).__name__,
                tuple(one.weight.shape),
                tuple(layer.output_shape) if layer else (),
                max(stride) if isinstance(stride, tuple) else int(stride),
                layer.macs if layer else 0,
                layer.params if layer else 0,
            ),
        )
    return found


def _group(name: str, group: Units, granularity: Granularity, facts: Mapping[str, tuple[int, Layer]]) -> Group:
    names = group.layer_names
    own = [facts[layer] for layer in names if layer in facts]
    size, limits = group.scores.numel(), granularity.limits
    whole = size - int((group.scores == float("-inf")).sum())
    return Group(
        name=name,
        layers=tuple(layer for _, layer in own),
        units=size,
        whole=whole,
        least=min(size - limits.bounded(group), whole),
        multiple=min(limits.round_to, size),
        ratio=float(group.ratio) if granularity.budget is None else 1.0,
        depth=min((depth for depth, _ in own), default=0),
    )


def _of_masks(groups: Sequence[Units], model: nn.Module, cost: costs.Cost) -> Arithmetic:
    """Every unit of a group masks equally many weights; a weight masked is its products saved."""
    sizes = tuple(group.scores.numel() for group in groups)
    fixed: dict[str, float] = {}
    each: dict[str, list[float]] = {}
    for quantity in ("params", "macs"):
        whole, owned = masked_costs(quantity, groups, model, cost)
        fixed[quantity] = float(whole - sum(owned))
        each[quantity] = [float(mine / size) for mine, size in zip(owned, sizes, strict=True)]
    terms = {
        quantity: ((0, fixed[quantity], ()), *((1 + index, one, (index,)) for index, one in enumerate(each[quantity])))
        for quantity in ("params", "macs")
    }
    return Arithmetic(
        fixed=(0.0,) * len(groups),
        positions=tuple((index, index, float(size)) for index, size in enumerate(sizes)),
        params=terms["params"],
        macs=terms["macs"],
        layers=("", *names_of(groups)),
        units=sizes,
        times={},
    )


def _of_channels(groups: Sequence[Units], plan: Plan) -> Arithmetic:
    """The plan's products, with the lengths of axes as what the units of each group have on them."""
    owner = np.full(plan.size, len(groups))
    for index, group in enumerate(groups):
        assert group.structure is not None
        owner[group.structure.units] = index
    owner[0] = len(groups)
    tally = plan.tally
    counts = np.zeros((len(tally.starts), len(groups) + 1))
    ends = [*tally.starts[1:], len(tally.ids)]
    for axis, (start, end) in enumerate(zip(tally.starts, ends, strict=True)):
        counts[axis] = np.bincount(owner[tally.ids[start:end]], minlength=len(groups) + 1)
    layers = list(dict.fromkeys([*tally.param_layers, *tally.mac_layers]))
    number = {name: index for index, name in enumerate(layers)}

    def terms(
        rows: tuple[np.ndarray, np.ndarray], names: Sequence[str]
    ) -> tuple[tuple[int, float, tuple[int, ...]], ...]:
        one = len(tally.starts)  # the index that stands for a length of 1
        return tuple(
            (number[name], float(static), tuple(int(axis) for axis in which if axis != one))
            for name, static, which in zip(names, *rows, strict=True)
        )

    units = tuple(group.scores.numel() for group in groups)
    return Arithmetic(
        fixed=tuple(counts[:, -1].tolist()),
        positions=tuple(
            (int(axis), int(group), float(counts[axis, group]))
            for axis, group in zip(*counts[:, :-1].nonzero(), strict=True)
        ),
        params=terms(tally.params, tally.param_layers),
        macs=terms(tally.macs, tally.mac_layers),
        layers=tuple(layers),
        units=units,
        times={},
        channels=(plan.size - 1 - sum(units), sum(units)),
    )


def _timed(arithmetic: Arithmetic, plan: Plan, model: nn.Module, example_inputs: Tensor, rough: bool) -> Arithmetic:
    """With times measured at a few widths on this device."""
    if rough:
        whole = latency(model, example_inputs, example_inputs.device).median_ms
        return replace(arithmetic, rest=Curve((0.0, 1.0), (0.0, whole)))
    table = latency_table.measured(model, plan, example_inputs)
    times = {name: _curve(curve) for name, curve in table.layers.items()}
    return replace(arithmetic, times=times, rest=_curve(table.rest))


def _curve(curve: tuple[np.ndarray, np.ndarray]) -> Curve:
    return Curve(tuple(curve[0].tolist()), tuple(curve[1].tolist()))
