"""The learned filter skeleton: the penalty, death for good, and networks that equal plain ones without it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from prune_cli.layers.replacing import place
from prune_cli.layers.stripes import fitting
from prune_cli.training.filter_skeleton import Shrinkage, attach, detach


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    ).double()


NAMES = ["0.weight", "3.weight"]
NORMS = {"0.weight": ("0.bias", "1.weight", "1.bias"), "3.weight": ("3.bias",)}


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 3, 6, 6, generator=generator).double(), torch.randint(5, (16,), generator=generator)


def train(model: nn.Module, steps: int, hook=None, frozen: tuple[str, ...] = ()) -> None:
    parameters = [p for name, p in model.named_parameters() if not name.endswith(frozen or ("?",))]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for step in range(steps):
        x, y = batch(step)
        F.cross_entropy(model(x), y).backward()
        if hook:
            hook(step, {})
        optimizer.step()
        model.zero_grad()


def test_without_penalty_and_threshold_weights_train_as_in_the_plain_network():
    plain, model = network(), network()
    attach(model, NAMES)
    train(plain, 8)
    train(model, 8, Shrinkage(model, NAMES, 0.0, 0.0, NORMS), frozen=("strength",))
    masks = detach(model, NAMES, 0.0, NORMS)
    assert all(mask.all() for mask in masks.values())
    for name, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value), name


def test_the_penalty_is_the_subgradient_of_the_sum():
    model = network()
    attach(model, NAMES)
    skeleton = model[3].parametrizations.weight[0]
    skeleton.strength.data.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    x, y = batch(0)
    twin = copy.deepcopy(model)
    strength = twin[3].parametrizations.weight[0].strength
    (F.cross_entropy(twin(x), y) + 0.3 * strength.abs().sum()).backward()
    F.cross_entropy(model(x), y).backward()
    Shrinkage(model, NAMES, 0.3, 0.0, NORMS)(0, {})
    assert torch.allclose(skeleton.strength.grad, strength.grad)


def test_stripes_die_for_good_and_take_the_norms_of_dead_filters_along():
    model = network()
    attach(model, NAMES)
    first = model[0].parametrizations.weight[0]
    with torch.no_grad():
        first.strength[2] = 0.005
        first.strength[3, 0, 1, 1] = -0.005
    hook = Shrinkage(model, NAMES, 1e-3, 0.01, NORMS)
    before = None
    for round_ in range(5):
        train(model, 4, hook)
        alive = first.alive.clone()
        assert before is None or not (alive & ~before).any()
        before = alive
        assert not alive[2].any() and not alive[3, 0, 1, 1], round_
    x, _ = batch(99)
    masks = detach(model.eval(), NAMES, 0.01, NORMS)
    assert torch.equal(masks["0.weight"].flatten(1).any(1), masks["1.weight"])
    assert model[1].weight[2] == 0 and model[1].bias[2] == 0
    assert (model[0].weight[2] == 0).all() and type(model[0]) is nn.Conv2d
    assert model[0].bias[2] == 0 and model[0].bias[0] != 0
    small = copy.deepcopy(model)
    for name, data in fitting(model, masks).items():
        place(small, name, "stripes", data)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x))
