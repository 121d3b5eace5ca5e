"""Kernels (connectivity): exact counts, L2 order, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.kernel import Kernel
from prune_cli.measure import storage
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule

L2 = Criterion(weights.l2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 5), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.57, 0.99])
def test_exactly_the_kernels_of_least_norm_go(ratio):
    model = network()
    masks = select(Granularity(Kernel(), ratio), L2, model, torch.zeros(1, 3, 8, 8)).masks
    assert sorted(masks) == ["0.weight", "1.weight"]
    for name, mask in masks.items():
        norms = model.get_parameter(name).detach().flatten(2).norm(dim=2)
        gone = ~mask[:, :, 0, 0]
        assert int(gone.sum()) == min(round(ratio * 100) * norms.numel() // 100, norms.numel() - 1)
        assert ratio == 0 or norms[gone].max() <= norms[~gone].min()


def test_what_is_masked_stays_masked():
    model = network()
    held = {"0.weight": torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)) > 0.3}
    masks = select(Granularity(Kernel(), 0.6), L2, model, torch.zeros(1, 3, 8, 8), masked=held).masks
    assert not (masks["0.weight"] & ~held["0.weight"]).any()
    assert int((~masks["0.weight"]).sum()) == 14


def test_refusals():
    channel = Criterion(lambda view: view.weight.flatten(1).sum(1), level="channel")
    with pytest.raises(ConfigError, match="choose criterion=l1"):
        Granularity(Kernel()).check(network(), channel)
    with pytest.raises(ConfigError, match=r"2\.weight \(4x6x1x1\)"):
        Granularity(Kernel(), rules=(Rule(types=("Conv2d",)),)).check(network(), L2)
    with pytest.raises(ConfigError, match="the network has none; choose"):
        Granularity(Kernel()).check(nn.Sequential(nn.Linear(4, 4)), L2)


def test_storage():
    mask = torch.ones(8, 3, 1, 1, dtype=torch.bool)
    mask[0] = False
    forms = Kernel().forms(nn.Sequential(nn.Conv2d(3, 8, 5), nn.Linear(8, 8)), {})
    assert set(forms) == {"0.weight"}
    name, cost = storage.stored(forms["0.weight"], mask, (8, 3, 5, 5))
    assert name == "kernel"
    assert (cost.values, cost.bitmaps) == (21 * 25 * 4, 3)
