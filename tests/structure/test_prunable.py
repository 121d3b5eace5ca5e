"""The weight of one layer: its names, its axis, and what is a parameter."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.granularities.element import Element
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.structure.prunable import owner, target, targets


def test_targets_are_named_as_parameters_and_know_their_layer():
    first, up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2, bias=False)
    model = nn.Sequential(first, nn.BatchNorm2d(4), nn.Sequential(up))
    model.again = first  # one weight, named once
    found = targets(model)
    assert list(found) == ["0.weight", "2.0.weight"]
    assert found["2.0.weight"].layer == owner("2.0.weight") == "2.0"
    assert (found["0.weight"].axis, found["0.weight"].channels, found["0.weight"].bias) == (0, 4, first.bias)
    assert (found["2.0.weight"].axis, found["2.0.weight"].channels, found["2.0.weight"].bias) == (1, 6, None)
    assert target(model, "2.0.weight") == found["2.0.weight"]


def test_a_computed_weight_is_no_parameter():
    layer = parametrizations.weight_norm(nn.Linear(3, 2))
    found = target(nn.Sequential(layer), "0.weight")
    assert not found.is_parameter and torch.equal(found.weight, layer.weight)


def test_a_network_that_is_one_layer_can_be_pruned():
    layer = nn.Linear(4, 2)
    masks = select(Granularity(Element(), 0.5), Criterion(weights.l1), layer, torch.zeros(1, 4)).masks
    assert list(masks) == ["weight"] and int(masks["weight"].sum()) == 4
