"""Stripes and kernels: exact counts over the whole layer, against brute force, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.stripe import Stripe
from prune_cli.measure import cost as measure
from prune_cli.measure import storage
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule

L1, L2 = Criterion(weights.l1), Criterion(weights.l2)
IMAGE = torch.zeros(1, 3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, (1, 5), padding=(0, 2)), nn.Conv2d(6, 4, 1), nn.Flatten(),
        nn.Linear(4 * 36, 10),
    )  # fmt: skip


def test_the_lowest_stripes_of_the_whole_layer_go():
    model = network()
    selection = select(Granularity(Stripe(), 0.57), L1, model, IMAGE)
    assert {name: tuple(mask.shape) for name, mask in selection.masks.items()} == {
        "0.weight": (8, 1, 3, 3), "2.weight": (6, 1, 1, 5),
    }  # fmt: skip
    for name, mask in selection.masks.items():
        weight = model.get_parameter(name).detach()
        norms = sorted(
            (float(weight[n, :, i, j].abs().sum()), (n, i, j))
            for n in range(weight.shape[0]) for i in range(weight.shape[2]) for j in range(weight.shape[3])
        )  # fmt: skip
        gone = {place for _, place in norms[: int(0.57 * len(norms))]}
        assert {tuple(place) for place in torch.nonzero(~mask[:, 0]).tolist()} == gone


def test_all_layers_together():
    model = network()
    masks = select(Granularity(Stripe(), 0.5, scope="global", normalize="none"), L2, model, IMAGE).masks
    kept, gone = [], []
    for name, mask in masks.items():
        norms = model.get_parameter(name).detach().square().sum(1, keepdim=True)
        kept.append(norms[mask])
        gone.append(norms[~mask])
    assert torch.cat(gone).numel() == (72 + 30) // 2
    assert torch.cat(gone).max() <= torch.cat(kept).min()


def test_what_is_masked_stays_masked_and_ties_go_by_index():
    model = nn.Sequential(nn.Conv2d(3, 2, 3))
    nn.init.ones_(model[0].weight)
    first = select(Granularity(Stripe(), 0.5), L1, model, IMAGE).masks["0.weight"].flatten()
    assert first.tolist() == [False] * 9 + [True] * 9
    held = {"0.weight": torch.ones(2, 1, 3, 3, dtype=torch.bool)}
    held["0.weight"][1, 0, 2, 2] = False
    second = select(Granularity(Stripe(), 0.1), L1, model, IMAGE, masked=held).masks["0.weight"]
    assert torch.equal(second, held["0.weight"])


def test_1x1_and_linear_layers_are_refused_where_they_were_chosen():
    model = network()
    Granularity(Stripe(), 0.5).check(model, L1)  # everything asked alike: they stay dense
    for rules in [(Rule(types=("Conv2d",)),), (Rule(names=("0", "5")),)]:
        with pytest.raises(ConfigError, match=r"(3|5)\.weight .*needs a convolution .*choose granularity=filter"):
            Granularity(Stripe(), 0.5, rules=rules).check(model, L1)
    with pytest.raises(ConfigError, match="the network has none"):
        Granularity(Stripe()).check(nn.Sequential(nn.Linear(4, 4)), L1)


def test_other_scores_and_patterns_are_refused(tmp_path):
    channel = Criterion(lambda view: view.weight.flatten(1).sum(1), level="channel")
    with pytest.raises(ConfigError, match="choose criterion=l1"):
        Granularity(Stripe()).check(network(), channel)
    file = tmp_path / "ratios.yaml"
    file.write_text("prune_ratio: {0.weight: m4n2}")
    with pytest.raises(ConfigError, match="N:M pattern"):
        Granularity(Stripe(), ratio_file=file).check(network(), L1)


def test_storage():
    mask = torch.zeros(8, 1, 3, 3, dtype=torch.bool)
    mask.view(-1)[:10] = True
    forms = Stripe().forms(nn.Sequential(nn.Conv2d(5, 8, 3), nn.Conv2d(8, 8, 1)), {})
    assert set(forms) == {"0.weight"}
    name, cost = storage.stored(forms["0.weight"], mask, (8, 5, 3, 3), bits=16)
    assert name == "stripe"
    assert (cost.values, cost.bitmaps, cost.total) == (10 * 5 * 2, 9, 109)


@pytest.mark.parametrize(("quantity", "target"), [("macs", 0.6), ("params", 0.85)])
def test_a_budget_of_what_masks_save(quantity, target):
    model = network()
    granularity = Granularity(Stripe(), scope="global", budget=Budget(**{quantity: target}))
    granularity.check(model, L2, IMAGE)
    masks = select(granularity, L2, model, IMAGE).masks
    whole = measure.cost(model, IMAGE)
    left = measure.cost(model, IMAGE, masks)
    part = left.macs_nonzero / whole.macs if quantity == "macs" else left.params_nonzero / whole.params
    assert target - 0.03 < part <= target
