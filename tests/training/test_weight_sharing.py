"""Trained centroids: their gradient is autograd's, and no optimizer can part what shares a value or wake a zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.compression import codec, kmeans
from prune_cli.training import weight_sharing


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 49, 5)
    )


def clustered(model: nn.Module, clusters: int = 5) -> dict[str, kmeans.Clustered]:
    shared = {}
    for index, name in enumerate(("0.weight", "4.weight")):
        weight = model.get_parameter(name).detach()
        keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(index)) < 0.4
        shared[name] = kmeans.cluster(weight, keep, clusters)
    return shared


def test_the_gradient_of_a_centroid_is_that_of_autograd_through_the_assignment():
    model = network().double()
    shared = clustered(model)
    weight_sharing.attach(model, shared)
    x = torch.randn(4, 2, 7, 7).double()
    model(x).sin().sum().backward()
    reference = network().double()
    codebooks = {name: layer.codebook.clone().requires_grad_() for name, layer in shared.items()}
    weights = {
        name: torch.where(layer.assignment >= 0, codebooks[name][layer.assignment.clamp_min(0)], 0)
        for name, layer in shared.items()
    }
    torch.func.functional_call(reference, weights, x).sin().sum().backward()
    for name, codebook in codebooks.items():
        module = model.get_submodule(name[0])
        assert torch.equal(module.weight, weights[name])
        assert torch.allclose(module.parametrizations.weight.original.grad, codebook.grad)


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_every_step_a_layer_has_its_few_values_and_its_zeros(optimizer):
    model = network()
    shared = clustered(model)
    weight_sharing.attach(model, shared)
    trained = OPTIMIZERS[optimizer](model.parameters())
    before = model[4].weight.detach().clone()
    for _ in range(8):
        model(torch.randn(6, 2, 7, 7)).square().mean().backward()
        trained.step()
        trained.zero_grad()
        for name, layer in shared.items():
            weight = model.get_submodule(name[0]).weight.detach()
            assert (weight[layer.assignment < 0] == 0).all()
            for number in range(len(layer.codebook)):
                assert len(weight[layer.assignment == number].unique()) == 1
    assert not torch.equal(model[4].weight, before)


def test_detaching_leaves_a_plain_network_of_the_same_function():
    model = network().eval()
    names, shared = list(model.state_dict()), clustered(model)
    weight_sharing.attach(model, shared)
    model[4].parametrizations.weight.original.data[0] = -0.0
    x = torch.randn(3, 2, 7, 7)
    before = model(x)
    weight_sharing.detach(model, shared)
    assert sorted(model.state_dict()) == sorted(names) and type(model[4]) is nn.Linear
    assert torch.equal(model(x), before)
    assert (codec.pattern_of(model[4].weight) == 0).sum() == (model[4].weight == 0).sum()
