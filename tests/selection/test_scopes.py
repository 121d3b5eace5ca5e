"""What is compared with what: output rows, numbers drawn per unit, magnitudes under lamp, lopsided choices."""

from __future__ import annotations

import itertools
import logging
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion, LayerView, Nature
from prune_cli.errors import ConfigError
from prune_cli.granularities.element import Element, output_rows
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.kernel import Kernel
from prune_cli.granularities.stripe import Stripe
from prune_cli.granularities.units import Units
from prune_cli.measure.cost import cost
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.models.vgg import vgg
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.ranking import Limits, normalized, rank
from prune_cli.selection.select import select

L1, L2, RANDOM = (Criterion(score) for score in (weights.l1, weights.l2, weights.random))
IMAGE = torch.zeros(1, 3, 16, 16)
CFG = [16, "M", 32, 64, "M", 128, 128]


def narrow_vgg() -> nn.Module:
    torch.manual_seed(0)
    return vgg(num_classes=10, in_shape=(3, 16, 16), depth=None, cfg=CFG)


# ------------------------------------------------------------------------------------------------ rows

LAYERS = [
    nn.Linear(24, 7),
    nn.Conv2d(6, 8, 3, groups=2),
    nn.Conv1d(4, 5, 5),
    nn.ConvTranspose2d(6, 4, 3),
    nn.ConvTranspose2d(6, 8, 3, groups=2),
]


def by_output(layer: nn.Module, index: int) -> torch.Tensor:
    """What of a weight the output channel is made of, seen by its gradient."""
    if isinstance(layer, nn.Linear):
        inputs = torch.ones(1, layer.in_features)
    else:
        inputs = torch.ones(1, layer.in_channels, *[7] * (layer.weight.dim() - 2))
    (gradient,) = torch.autograd.grad(layer(inputs)[0, index].sum(), layer.weight)
    return gradient != 0


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_row_is_everything_that_one_output_is_made_of(layer):
    rows = output_rows(layer, layer.weight.shape)
    positions = rows.positions()
    assert len(positions) == rows.count
    assert positions.flatten().sort().values.tolist() == list(range(layer.weight.numel()))
    for index, row in enumerate(positions):
        assert row.sort().values.tolist() == by_output(layer, index).flatten().nonzero().flatten().tolist()


@given(st.integers(0, 4), st.integers(0, 99), st.integers(0, 5), st.floats(0, 0.6), st.sampled_from([1.0, 0.5]))
@settings(max_examples=60, deadline=None)
def test_every_row_loses_exactly_its_lowest_k_of_n(which, percent, seed, min_keep, fraction):
    torch.manual_seed(seed)
    layer = LAYERS[which]
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape))
    granularity = Granularity(Element(), percent / 100, scope="row", min_keep=min_keep)
    granularity.check(layer, L1)
    masks = select(granularity, L1, layer, IMAGE, fraction=fraction).masks
    keep, scores = masks["weight"].flatten(), layer.weight.detach().abs().flatten()
    for row in output_rows(layer, layer.weight.shape).positions():
        floor = max(1, int(Fraction(str(min_keep)) * len(row)))
        gone = min(int(Fraction(percent, 100) * Fraction(str(fraction)) * len(row)), len(row) - floor)
        assert int((~keep[row]).sum()) == gone
        if gone:
            assert scores[row][~keep[row]].max() <= scores[row][keep[row]].min()


def test_rows_are_not_the_layer():
    layer = nn.Linear(8, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(16.0).view(2, 8) + 1)
    by_layer = select(Granularity(Element(), 0.5), L1, layer, torch.zeros(1, 8)).masks["weight"]
    by_row = select(Granularity(Element(), 0.5, scope="row"), L1, layer, torch.zeros(1, 8)).masks["weight"]
    assert by_layer.sum(1).tolist() == [0, 8]
    assert by_row.sum(1).tolist() == [4, 4]


def test_a_budget_goes_row_by_row():
    model = narrow_vgg()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3)  # so that only masked weights are zero
    granularity = Granularity(Element(), scope="row", budget=Budget(macs=0.4))
    granularity.check(model, L1, IMAGE)
    masks = select(granularity, L1, model, IMAGE).masks
    left = cost(model, IMAGE, masks)
    assert 0.37 * left.macs <= left.macs_nonzero <= 0.4 * left.macs
    for mask in masks.values():
        assert len(set(mask.flatten(1).sum(1).tolist())) == 1


@pytest.mark.parametrize("granularity", ["filter", "kernel", "stripe"])
def test_rows_of_other_units_are_refused_in_one_line(prune, granularity):
    result = prune(
        "run", "recipe=quickstart", f"granularity={granularity}", "granularity.scope=row", "dataset=fake", "device=cpu"
    )
    assert result.code == 2
    assert f"scope=row compares single weights inside each output row, not {granularity} units" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_rows_are_normalised_by_nothing():
    with pytest.raises(ConfigError, match="needs scope=global"):
        Granularity(Element(), scope="row", normalize="layer_mean").check(narrow_vgg(), L1)


# ------------------------------------------------------------------------------------------------ numbers drawn

DRAWN = [
    *itertools.product([Filter(), Stripe(), Kernel(), Element()], ["none", "layer_mean", "layer_l2", "lamp", None]),
]


@pytest.mark.parametrize(("units", "normalize"), DRAWN, ids=lambda value: getattr(value, "name", str(value)))
def test_random_units_go_evenly_from_small_and_large_layers(units: Units, normalize):
    granularity = Granularity(units, 0.5, scope="global", normalize=normalize)
    model = narrow_vgg()
    granularity.check(model, RANDOM)
    _even(select(granularity, RANDOM, model, IMAGE, seed=3).kept, _sizes(granularity, model))


@pytest.mark.parametrize("dependency", ["group", "union_keep", "inner_only"])
def test_random_channels_go_evenly_from_coupled_layers(dependency):
    model = resnet_cifar(num_classes=10, in_shape=(3, 16, 16), depth=8, widths=(32, 64, 128))
    granularity = Granularity(Filter(), 0.5, scope="global", dependency=dependency)
    _even(select(granularity, RANDOM, model, IMAGE, seed=3).kept, _sizes(granularity, model))


def test_random_budgets_take_evenly_too():
    model = narrow_vgg()
    kept = select(Granularity(Filter(), scope="global", budget=Budget(macs=0.3)), RANDOM, model, IMAGE, seed=1).kept
    sizes = _sizes(Granularity(Filter(), 0.5), model)
    _even(kept, sizes, ratio=1 - sum(kept.values()) / sum(sizes.values()))


def _sizes(granularity: Granularity, model: nn.Module) -> dict[str, int]:
    return dict(select(granularity, RANDOM, model, IMAGE, fraction=0.0).kept)


def _even(kept, sizes, ratio=0.5):
    """Every layer loses its part within five standard deviations of a draw without replacement."""
    total = sum(sizes.values())
    for name, size in sizes.items():
        spread = math.sqrt(size * ratio * (1 - ratio) * (1 - size / total))
        assert abs(size - kept[name] - ratio * size) <= 5 * spread + 1, (name, kept[name], size)


def test_a_drawn_criterion_of_ones_own_draws_per_unit_too():
    @Nature(drawn=True)
    def coin(view: LayerView) -> torch.Tensor:
        return torch.rand(view.weight.shape, generator=view.generator)

    granularity, model = Granularity(Filter(), 0.5, scope="global"), narrow_vgg()
    _even(select(granularity, Criterion(coin), model, IMAGE, seed=3).kept, _sizes(granularity, model))


# ------------------------------------------------------------------------------------------------ lamp


@given(st.lists(st.floats(0.01, 30), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_lamp_is_of_magnitudes_whatever_power_the_scores_have(values):
    magnitudes = torch.tensor(values, dtype=torch.double)
    assert torch.allclose(normalized(magnitudes, "lamp"), normalized(magnitudes.square(), "lamp", power=2))


def test_lamp_chooses_the_same_weights_by_l1_and_l2():
    granularity = Granularity(Element(), 0.8, scope="global", normalize="lamp")
    first, second = (select(granularity, criterion, narrow_vgg(), IMAGE).masks for criterion in (L1, L2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lamp_of_what_is_no_magnitude_is_refused(prune):
    result = prune(
        "run", "recipe=quickstart", "granularity.scope=global", "granularity.normalize=lamp", "criterion=taylor",
        "dataset=fake", "device=cpu",
    )  # fmt: skip
    assert result.code == 2
    assert "normalize=lamp is defined for magnitudes" in result.err
    assert len(result.err.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------ lopsided


def test_a_lopsided_choice_is_a_warning_that_names_the_layers(caplog):
    model = narrow_vgg()
    with torch.no_grad():
        model.features[0].weight.mul_(1e-6)
    lopsided = Granularity(Filter(), 0.05, scope="global", normalize="none")
    with caplog.at_level(logging.DEBUG, logger="prune_cli"):
        select(lopsided, L1, model, IMAGE)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "93.8 % of features.0" in warning
    assert "features.0 0.938" in next(r.getMessage() for r in caplog.records if "removed by layer" in r.getMessage())


@pytest.mark.parametrize(
    "granularity",
    [
        Granularity(Filter(), 0.2, scope="global", normalize="layer_mean"),
        Granularity(Filter(), 0.2),
        Granularity(Filter(), 0.2, scope="global", normalize="none", max_ratio=0.5),
    ],
)
def test_an_even_choice_is_none(granularity, caplog):
    model = narrow_vgg()
    with torch.no_grad():
        model.features[0].weight.mul_(1e-6)
    with caplog.at_level(logging.INFO, logger="prune_cli"):
        select(granularity, L1, model, IMAGE)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_trials_say_nothing(caplog):
    model = narrow_vgg()
    lopsided = Granularity(Filter(), 0.5, scope="global", normalize="none", min_keep=0.3)
    with caplog.at_level(logging.DEBUG, logger="prune_cli"):
        select(lopsided, L1, model, IMAGE, quiet=True)
    assert not caplog.records


def test_rank_needs_no_rows_where_units_have_none():
    assert rank([], "row", "none", Limits()).counts(Fraction(1)) == []
