"""Channels weighed against what they save: by brute force, inside budgets, and what it refuses."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.units import Context, Group
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.per_cost import positions, worth
from prune_cli.selection.ranking import Limits
from prune_cli.selection.select import select
from prune_cli.structure import follow

L1, L2, RANDOM, FPGM = (
    Criterion(weights.l1), Criterion(weights.l2), Criterion(weights.random), Criterion(weights.fpgm, "channel"),
)  # fmt: skip
IMAGE = torch.zeros(1, 3, 8, 8)


def network(seed: int = 0, widths=(4, 6, 8)) -> nn.Module:
    torch.manual_seed(seed)
    return resnet_cifar(num_classes=5, in_shape=(3, 8, 8), depth=8, widths=widths)


def groups_of(model: nn.Module, dependency="group") -> list[Group]:
    names = [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    scores = {name: model.get_parameter(name).detach().square() for name in names}
    return Filter().groups(Context(model, IMAGE, scores, dict.fromkeys(names, 0.5), {}, dependency))


@given(
    st.integers(0, 50),
    st.floats(0.2, 0.9),
    st.sampled_from(["macs", "params"]),
    st.sampled_from(["group", "inner_only"]),
)
@settings(max_examples=12, deadline=None)
def test_every_step_takes_the_unit_of_least_worth_per_saving(seed, target, quantity, dependency):
    """Brute force: shares of slices of the weights themselves, and the network counted with and without every unit."""
    model = network(seed)
    found, plan = groups_of(model, dependency), follow.analyse(model, IMAGE)
    budget, limits = Budget(**{quantity: round(target, 3)}), Limits(min_keep=0.25)
    placed = positions(found, limits, budget)
    keep, whole = plan.everything(), getattr(plan.count(plan.everything()), quantity)
    families = {family.name: family for family in plan.families}
    alive = {group.name: list(range(group.scores.numel())) for group in found}
    order = sorted((float(score), group.name, unit) for group in placed for unit, score in enumerate(group.scores))
    total = sum(map(len, alive.values()))
    for place, name, unit in order:
        if getattr(plan.count(keep), quantity) <= budget.target * whole or place >= total:
            break
        best = {}
        for other, left in alive.items():
            size = next(group.scores.numel() for group in found if group.name == other)
            if len(left) <= max(1, int(0.25 * size)):
                continue
            parts = [pieces(model, plan, families[other], place) for place in members(families[other])]
            whole_shares = sum(part / part.sum() for part in parts)
            lowest = min(left, key=lambda index: whole_shares[index])
            value = sum(float(part[lowest] / part[left].sum()) for part in parts)
            id_ = families[other].units[lowest]
            before = getattr(plan.count(keep), quantity)
            keep[id_] = False
            saved = before - getattr(plan.count(keep), quantity)
            keep[id_] = True
            best[other] = (value / max(saved, 1), lowest)
        least = min(value for value, _ in best.values())
        assert best[name][1] == unit
        assert best[name][0] == pytest.approx(least)
        keep[families[name].units[unit]] = False
        alive[name].remove(unit)


def members(family):
    """Convolutions and the linear layer that make the channels or read them."""
    return [*family.producers, *family.consumers]


def pieces(model: nn.Module, plan, family, place) -> np.ndarray:
    """Squares of a layer's weights by unit of a family, with plain loops over slices."""
    name, axis = place
    weight = model.get_parameter(name).detach().double()
    found = dict.fromkeys(family.units, 0.0)
    for position, unit in enumerate(plan.axes[name][axis]):
        if unit in found:
            found[unit] += float(weight.select(axis, position).square().sum())
    return np.array([found[unit] for unit in family.units])


def test_worth_is_lamp_where_a_unit_lies_in_one_layer():
    squares = torch.tensor([[4.0, 1.0, 3.0]], dtype=torch.double)
    order, values = worth(Group("a", squares[0], 0.5, lambda keep: {}, parts=lambda: squares.clone()))
    assert order.tolist() == [1, 2, 0]
    assert values.tolist() == pytest.approx([1 / 8, 3 / 7, 1])


def test_what_is_masked_already_goes_first_and_is_worth_nothing():
    squares = torch.tensor([[4.0, 1.0, 3.0]], dtype=torch.double)
    scores = torch.tensor([float("-inf"), 1.0, 3.0])
    order, values = worth(Group("a", scores, 0.5, lambda keep: {}, parts=lambda: squares.clone()))
    assert order.tolist() == [0, 1, 2]
    assert values.tolist() == pytest.approx([0, 1 / 4, 1])


@pytest.mark.parametrize("criterion", [L1, L2, FPGM, RANDOM], ids=["l1", "l2", "fpgm", "random"])
@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_a_budget_alone_is_met_over_the_whole_network(criterion, quantity):
    model = network(widths=(8, 16, 32))
    granularity = Granularity(Filter(), budget=Budget(**{quantity: 0.5}))
    assert granularity.scope == "global"
    granularity.check(model, criterion, IMAGE)
    chosen = select(granularity, criterion, model, IMAGE)
    plan = follow.analyse(model, IMAGE)
    left = getattr(plan.count(chosen.candidate[1]), quantity) / getattr(plan.count(plan.everything()), quantity)
    assert 0.45 < left <= 0.5
    assert len(set(chosen.kept.values())) > 1


def test_scaling_a_layer_changes_nothing():
    """What made sums a trap: layers of many or large weights look important."""
    model, granularity = network(widths=(8, 16, 32)), Granularity(Filter(), budget=Budget(macs=0.5))
    before = select(granularity, L2, model, IMAGE).kept
    with torch.no_grad():
        model.layer2[0].conv1.weight.mul_(1e-3)
        model.layer3[0].conv2.weight.mul_(1e3)
    assert select(granularity, L2, model, IMAGE).kept == before


def test_a_part_of_the_way_is_a_part_of_the_order():
    model, granularity = network(widths=(8, 16, 32)), Granularity(Filter(), budget=Budget(macs=0.3))
    half, whole = (select(granularity, L2, model, IMAGE, fraction=share) for share in (0.5, 1.0))
    assert all((half.masks[name] | ~mask).all() for name, mask in whole.masks.items() if name in half.masks)
    assert 0 < half.removed < whole.removed


def test_other_budgets_and_couplings_stay_with_each_layer():
    assert Granularity(Filter(), budget=Budget(latency_ms=1.0)).scope == "layer"
    assert Granularity(Filter(), budget=Budget(macs=0.5), dependency="union_keep").scope == "layer"
    assert Granularity(Element(), budget=Budget(macs=0.5)).scope == "layer"
    assert Granularity(Filter()).scope == "layer"
    assert Granularity(Filter(), scope="layer", budget=Budget(macs=0.5)).normalization(L1) == "none"
    assert Granularity(Filter(), scope="global").normalization(L1) == "layer_mean"
    assert Granularity(Filter(), scope="global").normalization(FPGM) == "none"
    assert Granularity(Element(), scope="global").normalization(L1) == "none"


@pytest.mark.parametrize(
    "granularity",
    [
        Granularity(Filter(), scope="global", normalize="per_cost"),
        Granularity(Element(), scope="global", normalize="per_cost", budget=Budget(macs=0.5)),
        Granularity(Filter(), scope="global", normalize="per_cost", budget=Budget(latency_ms=1.0)),
        Granularity(Filter(), scope="global", normalize="per_cost", budget=Budget(macs=0.5), dependency="union_keep"),
    ],
)
def test_what_cannot_be_weighed_is_refused(granularity):
    with pytest.raises(ConfigError, match="per_cost weighs channels"):
        granularity.check(network(), L1)


def test_no_groups_and_shares_of_none():
    assert positions([], Limits(), Budget(macs=0.5)) == []
    assert Budget(macs=0.5).allowed(Fraction(1), 100) == 50
