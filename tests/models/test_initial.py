from __future__ import annotations

import torch
from torch import nn

from prune_cli.models.initial import initialise
from prune_cli.models.vgg import vgg


def test_deviations_and_constants() -> None:
    model = nn.Sequential(nn.Conv2d(30, 200, 3), nn.BatchNorm2d(200), nn.Flatten(), nn.Linear(200, 400))
    nn.init.constant_(model[1].weight, 3)
    model[1].running_mean.fill_(2)
    initialise(model, torch.Generator().manual_seed(0))
    assert abs(float(model[0].weight.detach().std()) / (2 / (200 * 9)) ** 0.5 - 1) < 0.02
    assert abs(float(model[3].weight.detach().std()) / 0.01 - 1) < 0.02
    assert model[0].bias.abs().sum() == model[3].bias.abs().sum() == model[1].running_mean.abs().sum() == 0
    assert model[1].weight.tolist() == [1] * 200


def test_one_seed_gives_one_network() -> None:
    model = vgg(num_classes=3, in_shape=(1, 8, 8), depth=None, cfg=[4, "M", 5])
    states = []
    for seed in (1, 1, 2):
        initialise(model, torch.Generator().manual_seed(seed))
        states.append(model.features[0].weight.clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
