"""Reordered networks compute what they did, and N:M keeps more of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import SurgeryError
from prune_cli.granularities.n_m import NM
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.permutation import network
from prune_cli.permutation.network import permute, permute_masks
from prune_cli.permutation.search import kept
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.structure.follow import analyse


class Shuffled(nn.Module):
    """A split, a shuffle, a depthwise and a grouped convolution: channels that may not go everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.left = nn.Conv2d(16, 16, 3, padding=1)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 16, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.Linear(16 * 4, 10)

    def forward(self, x):
        a, b = self.first(x).chunk(2, dim=1)
        x = torch.cat([torch.relu(self.left(a)), b], dim=1)
        x = self.grouped(torch.relu(self.depth(x)))
        return self.last(nn.functional.adaptive_avg_pool2d(torch.relu(self.norm(x)), 2).flatten(1))


def vgg() -> nn.Module:
    layers, channels = [], 3
    for width in (16, 32, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 24), nn.ReLU(), nn.Linear(24, 10))


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10)


MODELS = {
    "resnet_a": lambda: resnet_cifar(num_classes=10, in_shape=(3, 32, 32), depth=8),
    "resnet_b": lambda: resnet_cifar(num_classes=10, in_shape=(3, 32, 32), depth=8, shortcut="B"),
    "vgg": vgg,
    "densenet": densenet,
    "shuffled": Shuffled,
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25),
}


def prepared(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def patterns_of(model: nn.Module, pattern=(4, 2)) -> dict[str, tuple[int, int]]:
    return {
        f"{name}.weight": pattern for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_function_stays_and_more_magnitude_is_kept(name):
    model = prepared(name)
    dense = copy.deepcopy(model)
    result = permute(model, analyse(model, torch.zeros(1, 3, 32, 32)), patterns_of(model), window=8, escapes=0)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = dense(x), model(x)
    assert float((got - expected).abs().max()) <= 1e-5 * max(1, float(expected.abs().max()))
    assert sum(layer.after for layer in result.layers) > sum(layer.before for layer in result.layers)
    for layer in result.layers:
        weight = model.get_parameter(layer.name).detach()
        assert layer.after == pytest.approx(kept(weight.movedim(1, -1).flatten(0, -2), 4, 2))
        original = dense.get_parameter(layer.name).detach()
        assert layer.before == pytest.approx(kept(original.movedim(1, -1).flatten(0, -2), 4, 2))
        assert layer.after <= layer.bound * (1 + 1e-9)
        assert torch.equal(weight.flatten().sort().values, original.flatten().sort().values)


def test_kept_magnitude_is_what_pruning_keeps():
    model = prepared("resnet_b")
    patterns = patterns_of(model)
    result = permute(model, analyse(model, torch.zeros(1, 3, 32, 32)), patterns)
    masks = select(Granularity(NM(), 0.5), Criterion(weights.l1), model, torch.zeros(1, 3, 32, 32)).masks
    for layer in result.layers:
        weight = model.get_parameter(layer.name).detach()
        assert float((weight.abs() * masks[layer.name]).double().sum()) == pytest.approx(layer.after, rel=1e-6)
    assert any(layer.efficacy > 5 for layer in result.layers)


def test_one_step_is_undone_by_its_inverse_and_moves_tell_where_masks_go():
    model = prepared("resnet_b")
    dense = copy.deepcopy(model)
    plan = analyse(model, torch.zeros(1, 3, 32, 32))
    masks = {name: dense.get_parameter(name).detach() > 0 for name in patterns_of(model)}
    result = permute(model, plan, patterns_of(model))
    moved = permute_masks(masks, result.moves)
    for name, mask in moved.items():
        assert torch.equal(mask, model.get_parameter(name).detach() > 0)
    thin = {name: torch.ones(1, 1, 1, 1, dtype=torch.bool) for name in masks if "conv" in name}
    assert all(mask.numel() == 1 for mask in permute_masks(thin, result.moves).values())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    network._apply(tensors, network._inverse(result.moves))
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_readers_of_the_same_channels_share_one_order():
    model = prepared("resnet_a")
    result = permute(model, analyse(model, torch.zeros(1, 3, 32, 32)), {"layer1.0.conv1.weight": (4, 2)})
    index = result.moves["layer1.0.conv1.weight"][1]
    assert not torch.equal(index, torch.arange(16))
    for name, axis in (("conv1.weight", 0), ("bn1.running_var", 0), ("layer1.0.conv2.weight", 0)):
        assert torch.equal(result.moves[name][axis], index)


def test_group_norms_keep_their_groups():
    model = prepared("shuffled")
    result = permute(model, analyse(model, torch.zeros(1, 3, 32, 32)), patterns_of(model))
    assert "norm.weight" not in result.moves
    assert "first.weight" in result.moves


def test_different_patterns_and_none():
    model = prepared("vgg")
    plan = analyse(model, torch.zeros(1, 3, 32, 32))
    assert permute(model, plan, {}).layers == ()
    patterns = {"4.weight": (4, 1), "8.weight": (8, 1), "15.weight": (4, 3)}
    result = permute(model, plan, patterns, escapes=0)
    assert [(layer.m, layer.n) for layer in result.layers] == [(4, 1), (8, 1), (4, 3)]
    assert all(layer.after > layer.before for layer in result.layers)


def test_outputs_that_change_are_undone_and_reported(monkeypatch):
    model = prepared("vgg")
    before = copy.deepcopy(model.state_dict())
    plan = analyse(model, torch.zeros(1, 3, 32, 32))
    real = network._moves

    def wrong(tensors, group, order):  # forgets the norm
        return {name: axes for name, axes in real(tensors, group, order).items() if name != "1.weight"}

    monkeypatch.setattr(network, "_moves", wrong)
    with pytest.raises(SurgeryError, match="left as it was"):
        permute(model, plan, patterns_of(model), escapes=0)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
