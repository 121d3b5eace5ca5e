"""Pruning before training: densities by round, no layer emptied where one shot empties one, and no data."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

from prune_cli.criteria import gradients
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.flow import synaptic_flow
from prune_cli.errors import ConfigError
from prune_cli.granularities.element import Element
from prune_cli.schedules.before_training import before_training
from prune_cli.schedules.schedule import most_epochs
from prune_cli.selection.granularity import Granularity
from tests.schedules.played import play, toy
from tests.session.tiny import DATA, begin, run

SYNFLOW = Criterion(gradients.synflow, needs=("synaptic_flow",))
SNIP = Criterion(gradients.snip, needs=("gradient",), norms="batch")
GRASP = Criterion(gradients.grasp, needs=("hessian_gradient",), norms="batch")


def deep() -> nn.Module:
    """Layers of very different sizes, the small ones where everything must pass."""
    torch.manual_seed(4)
    widths = [3, 8, 48, 48, 6, 48, 48]
    layers: list[nn.Module] = []
    for wide, next_wide in itertools.pairwise(widths):
        layers += [nn.Conv2d(wide, next_wide, 3, padding=1), nn.BatchNorm2d(next_wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4))


@pytest.mark.parametrize("rounds", [1, 7, 100])
def test_the_density_after_round_k_of_n_is_rho_to_the_k_over_n(rounds):
    problem = toy({"a": 80, "b": 80}, {"a": 1, "b": 1}, 0.02, quantity="units")
    fractions = [one.fraction for one in play(functools.partial(before_training, rounds=rounds), problem)]
    assert [1 - 0.98 * fraction for fraction in fractions] == pytest.approx(
        [0.02 ** (k / rounds) for k in range(1, rounds + 1)]
    )
    assert fractions[-1] == 1.0 and most_epochs(before_training) == 0


def test_a_hundred_rounds_empty_no_layer_where_one_shot_lets_nothing_through(tmp_path):
    ratio = 0.997
    found = {}
    for rounds in (1, 100):
        state = begin(tmp_path / str(rounds), model=deep())
        state = run(state, functools.partial(before_training, rounds=rounds), Granularity(Element(), ratio, scope="global"),
                    SYNFLOW)  # fmt: skip
        assert state.outcome.ratio_prunable == pytest.approx(ratio, abs=1e-4)
        found[rounds] = state
    names = list(found[1].masks)
    assert min(int(mask.sum()) for mask in found[1].masks.values()) == 1  # the one that always stays
    with pytest.raises(ConfigError, match=r"flow through the network is 0\.0"):
        synaptic_flow(found[1].model, torch.zeros(1, 3, 8, 8), names)
    assert min(int(mask.sum()) for mask in found[100].masks.values()) > 3
    shares = synaptic_flow(found[100].model, torch.zeros(1, 3, 8, 8), names)
    assert all(float(share.sum()) == pytest.approx(1) for share in shares.values())


def test_synflow_looks_at_no_data(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("data")

    for name in ("train", "calibration", "evaluation"):
        monkeypatch.setattr(type(DATA), name, never)
    monkeypatch.setattr("prune_cli.session.session.batches", lambda *_: 3)
    run(begin(tmp_path), functools.partial(before_training, rounds=3), Granularity(Element(), 0.9), SYNFLOW)


@pytest.mark.parametrize("criterion", [SNIP, GRASP], ids=["snip", "grasp"])
def test_criteria_of_gradients_score_an_untrained_network_in_one_round_or_several(criterion, tmp_path):
    masks = []
    for rounds in (1, 5):
        granularity = Granularity(Element(), 0.8, scope="global")
        after = run(
            begin(tmp_path / str(rounds)), functools.partial(before_training, rounds=rounds), granularity, criterion
        )
        assert after.outcome.ratio_prunable == pytest.approx(0.8, abs=1e-3)
        masks.append(torch.cat([mask.flatten() for mask in after.masks.values()]))
    assert not torch.equal(*masks)
