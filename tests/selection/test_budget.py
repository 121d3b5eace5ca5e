"""Budgets: never exceeded, met as closely as units allow, against counting the built network."""

from __future__ import annotations

import logging
from fractions import Fraction

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
from prune_cli.granularities.units import Context
from prune_cli.measure import cost as measure
from prune_cli.measure import layer_times
from prune_cli.selection import latency_table
from prune_cli.selection.budget import Budget, fit, kept_in_plan
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.ranking import Limits, even, rank
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule
from prune_cli.structure import follow, slicing, surgery
from prune_cli.structure.plan import Plan
from tests.granularities.test_filter import Residual

L1 = Criterion(weights.l1)
IMAGE = torch.zeros(1, 3, 8, 8)


def network(seed: int, widths: list[int]) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def built(model: nn.Module, masks: dict[str, torch.Tensor]) -> measure.Cost:
    """Cost of the network that is really made smaller, from the producers' masks."""
    plan = follow.analyse(model, IMAGE)
    keep = plan.everything()
    for family in plan.families:
        for name, axis in family.producers:
            if name in masks:
                weight = model.get_parameter(name)
                rows = masks[name].expand(weight.shape).movedim(axis, 0).flatten(1).any(1)
                keep[plan.axes[name][axis][~rows.numpy()]] = False
    return measure.cost(surgery.remove_units(model, plan, keep).model, IMAGE)


def groups_of(model: nn.Module, units: Filter | Element, dependency="group"):
    names = [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    scores = {name: model.get_parameter(name).detach().abs() for name in names}
    return even(units.groups(Context(model, IMAGE, scores, dict.fromkeys(names, 0.5), {}, dependency)))


@given(
    st.integers(0, 99), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 100),
    st.sampled_from(["macs", "params"]), st.sampled_from(["layer", "global"]), st.sampled_from([1, 1, 2, 4]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_the_built_network_is_inside_and_one_unit_more_would_not_be(seed, widths, percent, quantity, scope, multiple):
    model = network(seed, [*widths, 2])
    whole = getattr(measure.cost(model, IMAGE), quantity)
    budget = Budget(**{quantity: percent / 100})
    how = "none" if scope == "global" else None
    granularity = Granularity(Filter(), scope=scope, normalize=how, budget=budget, round_to=multiple)
    ranking = rank(groups_of(model, Filter()), scope, "none", granularity.limits)
    try:
        chosen = select(granularity, L1, model, IMAGE)
    except ConfigError as error:
        least = surgery_of(model, ranking, ranking.counts(Fraction(1)), quantity)
        assert least > percent / 100 * whole
        assert f"at least {-(-(10**4) * least // whole) / 10**4}" in str(error)
        return
    assert getattr(built(model, chosen.masks), quantity) * 100 <= percent * whole
    counts = fit(budget, ranking, Fraction(1), model, IMAGE)
    assert sum(counts) == chosen.removed
    # Brute force over every fraction: no step of the ranking with fewer units would do.
    allowed = Fraction(percent, 100) * whole
    for step in range(ranking.steps + 1):
        other = ranking.counts(Fraction(step, ranking.steps))
        if surgery_of(model, ranking, other, quantity) <= allowed:
            break
    assert all(mine <= theirs <= mine + multiple for mine, theirs in zip(counts, other, strict=True))
    assert scope == "layer" or counts == other
    before = ranking.counts(Fraction(max(step - 1, 0), ranking.steps))
    for index, (mine, less) in enumerate(zip(counts, before, strict=True)):
        if mine > less:  # giving back one more of the last step would be too much
            trial = [*counts[:index], less, *counts[index + 1 :]]
            assert surgery_of(model, ranking, trial, quantity) > allowed


def surgery_of(model: nn.Module, ranking, counts: list[int], quantity: str) -> int:
    """What the network costs that is built without these units."""
    plan = ranking.groups[0].structure.plan
    keep = kept_in_plan(ranking.groups, ranking.keep(counts))
    return getattr(plan.count(keep), quantity)


def test_candidates_cost_what_the_built_network_costs():
    model = network(1, [6, 4, 8])
    ranking = rank(groups_of(model, Filter()), "global", "none", Limits())
    plan = ranking.groups[0].structure.plan
    for step in range(0, ranking.steps + 1, 3):
        keep = kept_in_plan(ranking.groups, ranking.keep(ranking.counts(Fraction(step, ranking.steps))))
        cost = measure.cost(surgery.remove_units(model, plan, keep).model, IMAGE)
        assert (cost.macs, cost.params) == (plan.count(keep).macs, plan.count(keep).params)


@pytest.mark.parametrize("dependency", ["group", "union_keep", "inner_only"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_budgets_with_coupled_layers(dependency, scope, quantity):
    torch.manual_seed(2)
    model = Residual()
    whole = getattr(measure.cost(model, IMAGE), quantity)
    granularity = Granularity(Filter(), scope=scope, dependency=dependency, budget=Budget(**{quantity: 0.8}))
    left = getattr(built(model, select(granularity, L1, model, IMAGE).masks), quantity)
    biggest = max(whole - getattr(built(model, one), quantity) for one in single_units(model))
    assert 0.8 * whole - biggest <= left <= 0.8 * whole


def single_units(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    plan = follow.analyse(model, IMAGE)
    masks = []
    for unit in range(1, plan.size):
        keep = plan.everything()
        keep[unit] = False
        masks.append(slicing.structured_masks(model, plan, keep))
    return masks


@given(
    st.integers(0, 99), st.integers(1, 100), st.sampled_from(["macs", "params"]), st.sampled_from(["layer", "global"])
)
@settings(max_examples=40, deadline=None)
def test_single_weights_meet_budgets_by_what_is_not_zero(seed, percent, quantity, scope):
    model = network(seed, [3, 4])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)  # so that only masked weights are zero
    dense = measure.cost(model, IMAGE)
    whole = getattr(dense, quantity)
    granularity = Granularity(Element(), scope=scope, budget=Budget(**{quantity: percent / 100}))
    try:
        masks = select(granularity, L1, model, IMAGE).masks
    except ConfigError:
        weights_of = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
        prunable = sum(
            model.get_parameter(name).numel() if quantity == "params" else macs_of(dense, name) for name in weights_of
        )
        assert percent / 100 * whole < whole - prunable + 64 * len(weights_of)  # a weight stays in every layer
        return
    left = getattr(measure.cost(model, IMAGE, masks), f"{quantity}_nonzero")
    assert left * 100 <= percent * whole
    if percent < 100:
        one = 1 if quantity == "params" else 64  # multiply-adds of a weight of the convolutions on 8 x 8
        assert left > percent * whole / 100 - one - len(masks)


def macs_of(cost: measure.Cost, name: str) -> int:
    return next((layer.macs for layer in cost.layers if f"{layer.name}.weight" == name), 0)


def test_a_share_goes_that_part_of_the_way():
    model = network(4, [16, 32])
    whole = measure.cost(model, IMAGE).macs
    granularity = Granularity(Filter(), scope="global", budget=Budget(macs=0.4))
    left = [
        built(model, select(granularity, L1, model, IMAGE, fraction=fraction).masks).macs / whole
        for fraction in (0, 0.25, 0.5, 1)
    ]
    assert left[0] == 1
    assert left[1:] == [pytest.approx(part, abs=0.05) for part in (0.85, 0.7, 0.4)]
    assert all(now <= part for now, part in zip(left, (1, 0.85, 0.7, 0.4), strict=True))
    assert select(granularity, L1, model, IMAGE).requested is None


def test_illegal_budgets(tmp_path):
    model = network(0, [4, 4])
    legal = Granularity(Filter(), budget=Budget(macs=0.5))
    legal.check(model, L1, IMAGE)
    with pytest.raises(ValueError, match=r"exactly one of macs, params and latency_ms, got macs=0.5 and params=0.3"):
        Budget(macs=0.5, params=0.3)
    with pytest.raises(ValueError, match="got none"):
        Budget()
    with pytest.raises(ConfigError, match="not set ratios"):
        Granularity(Filter(), budget=Budget(macs=0.5), rules=(Rule(types=("default",), ratio=0.5),)).check(model, L1)
    with pytest.raises(ConfigError, match="no ratio_file"):
        file = tmp_path / "ratios.yaml"
        file.write_text("prune_ratio: {0.weight: 0.5}")
        Granularity(Filter(), budget=Budget(macs=0.5), ratio_file=file).check(model, L1)
    with pytest.raises(ConfigError, match=r"latency_ms does not work with element units.* macs or params"):
        Granularity(Element(), budget=Budget(latency_ms=5)).check(model, L1)


@pytest.mark.parametrize("units", [Filter(), Element()])
@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_what_cannot_be_met_is_refused_before_training_with_the_smallest_value_that_can(units, quantity):
    model = network(0, [8, 8])
    limits = {"max_ratio": 0.5}
    with pytest.raises(ConfigError, match=r"cannot be met: .*at least 0\.[0-9]+ of the") as refused:
        Granularity(units, budget=Budget(**{quantity: 0.01}), **limits).check(model, L1, IMAGE)
    least = float(str(refused.value).split("at least ")[1].split()[0])
    Granularity(units, budget=Budget(**{quantity: least}), **limits).check(model, L1, IMAGE)
    select(Granularity(units, budget=Budget(**{quantity: least}), **limits), L1, model, IMAGE)
    with pytest.raises(ConfigError, match="cannot be met"):
        Granularity(units, budget=Budget(**{quantity: least - 2e-4}), **limits).check(model, L1, IMAGE)


def test_rules_may_choose_the_layers_of_a_budget():
    model = network(0, [8, 8])
    granularity = Granularity(Filter(), budget=Budget(macs=0.7), rules=(Rule(names=("3",)),))
    granularity.check(model, L1, IMAGE)
    masks = select(granularity, L1, model, IMAGE).masks
    assert "0.weight" not in masks
    assert built(model, masks).macs <= 0.7 * measure.cost(model, IMAGE).macs


# ------------------------------------------------------------------------------------------------ latency


def table(model: nn.Module, plan: Plan) -> latency_table.Table:
    """A table made by hand: 1 ms per million multiply-adds of a layer and 2 ms besides."""
    dense = plan.count_layers(plan.everything())
    import numpy as np

    line = np.array([0.0, 1.0])
    curves = {name: (line, line * cost.macs / 1e6) for name, cost in dense.items() if cost.macs}
    return latency_table.Table(plan, dense, curves, (line, np.array([2.0, 2.0])), (line, np.array([1.5, 1.5])))


def test_predictions_are_interpolated_from_the_table():
    model = network(0, [8, 12])
    plan = follow.analyse(model, IMAGE)
    by_hand = table(model, plan)
    keep = plan.everything()
    keep[plan.families[0].units[:3]] = False
    expected = 2 + plan.count(keep).macs / 1e6
    assert by_hand.predict(keep).median_ms == pytest.approx(expected)
    assert by_hand.predict(keep).p95_ms == pytest.approx(1.5 * expected)


def test_a_latency_budget_is_met_by_prediction_then_measured(monkeypatch, caplog):
    model = network(0, [32, 48])
    monkeypatch.setattr(latency_table, "measured", lambda model, plan, image: table(model, plan))
    whole = 2 + measure.cost(model, IMAGE).macs / 1e6
    target = round(2 + 0.5 * (whole - 2), 3)
    granularity = Granularity(Filter(), scope="global", budget=Budget(latency_ms=target))
    with caplog.at_level(logging.INFO):
        masks = select(granularity, L1, model, IMAGE).masks
    left = 2 + built(model, masks).macs / 1e6
    assert target - 0.03 < left <= target
    assert "predicted" in caplog.text
    assert "measured" in caplog.text
    with pytest.raises(ConfigError, match=r"latency_ms=1.9 cannot be met: .* at least 2.* ms, predicted"):
        select(Granularity(Filter(), budget=Budget(latency_ms=1.9)), L1, model, IMAGE)


def test_measured_tables_reproduce_the_times_they_were_made_from():
    torch.set_num_threads(1)
    model = network(0, [32, 64, 64]).eval()
    image = torch.zeros(1, 3, 48, 48)
    plan = follow.analyse(model, image)
    found = latency_table.measured(model, plan, image)
    assert {"0", "1", "3", "6", "11"} <= set(found.layers)
    for at, times in found.layers.values():
        assert (times[1:] >= times[:-1]).all()
        assert (at > 0).all()
        assert at[-1] == 1
    wide, narrow = (
        found.predict(plan.everything()).median_ms,
        found.predict(latency_table._narrow(plan, 0.125)).median_ms,
    )
    assert 0 < narrow < wide  # 64 times fewer multiply-adds


def test_layer_times_leave_out_what_is_inside_and_the_model_as_it_was():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), nn.Conv2d(16, 4, 3), nn.Identity())
    model.train()
    times = layer_times.layer_times(model, IMAGE, ["0", "0.0", "1", "other"])
    assert set(times) == {"0", "0.0", "1"}
    assert all(value > 0 for value in times.values())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_latency_that_no_width_reaches_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"latency_ms=1e-05 cannot be met: .* ms, measured"):
        Granularity(Filter(), budget=Budget(latency_ms=1e-5)).check(network(0, [4]), L1, IMAGE)


# ------------------------------------------------------------------------------------------------ command line

QUICK = ("recipe=quickstart", "granularity=filter", "limit_batches=1", "latency=false", "device=cpu", "stages=[prune]",
         "dataset=fake", "model=resnet20")  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("schedule", ["one_shot", "iterative"])
def test_a_run_with_a_budget_reports_both_denominators(prune, schedule):
    more = ["schedule.epochs=2", "schedule.retrain_epoch=1", "schedule.prune_freq=1"] if schedule == "iterative" else []
    result = prune("run", *QUICK, f"schedule={schedule}", *more, "granularity.scope=global",
                   "granularity.dependency=inner_only", "granularity.budget={macs: 0.6}")  # fmt: skip
    assert result.code == 0, result.err
    row = result.rows.loc["prune"]
    assert row.ratio_requested != row.ratio_requested  # nan: the budget decides
    assert 0 < row.ratio_channels < row.ratio_prunable < 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("granularity.budget={macs: 0.5, params: 0.5}",), "exactly one of macs, params and latency_ms"),
        (("granularity.budget={mac: 0.5}",), "granularity.budget.mac: unknown key; did you mean 'macs'"),
        (("granularity.budget={macs: 1.5}",), "granularity.budget.macs"),
        (("granularity.budget={macs: 0.0001}",), "cannot be met"),
        (("granularity.budget={macs: 0.5}", "granularity.rules=[{types: [Conv2d], ratio: 0.5}]"), "not set ratios"),
        (("granularity.dependency=all",), "granularity.dependency"),
        (("granularity.units.reduce=median",), "granularity.units.reduce"),
        (("granularity.round_to=0",), "granularity.round_to"),
        (("granularity.max_ratio={conv: 0.5}",), "no layer 'conv'"),
        (("granularity.max_ratio=0",), "granularity.max_ratio"),
    ],
)
def test_wrong_values_are_one_line_and_code_2(prune, overrides, message):
    result = prune("run", *QUICK, *overrides)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
