from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.errors import ConfigError
from prune_cli.measure.cost import cost
from prune_cli.models.resnet_cifar import PadShortcut, resnet_cifar


def test_sizes_are_those_of_the_papers() -> None:
    published = {20: (0.27, 40.6), 32: (0.46, 68.9), 44: (0.66, 97.2), 56: (0.85, 125.5), 110: (1.73, 252.9)}
    for depth, (params, macs) in published.items():
        with torch.device("meta"):
            dense = cost(resnet_cifar(num_classes=10, in_shape=(3, 32, 32), depth=depth), (3, 32, 32))
        assert (round(dense.params / 1e6, 2), round(dense.macs / 1e6, 1)) == (params, macs)
    with torch.device("meta"):
        wide = resnet_cifar(num_classes=100, in_shape=(3, 32, 32), depth=32, widths=(64, 128, 256), shortcut="B")
        assert round(cost(wide, (3, 32, 32)).flops / 1e9, 4) == 2.2014


def test_names_are_those_of_the_public_checkpoint() -> None:
    state = resnet_cifar(num_classes=10, in_shape=(3, 32, 32)).state_dict()
    assert len(state) == 19 * 6 + 2
    assert {
        "conv1.weight",
        "bn1.bias",
        "layer1.0.conv1.weight",
        "layer3.2.bn2.running_var",
        "linear.bias",
    } <= set(state)
    assert not any("shortcut" in name for name in state)
    assert "layer2.0.shortcut.0.weight" in resnet_cifar(num_classes=10, in_shape=(3, 32, 32), shortcut="B").state_dict()


@pytest.mark.parametrize("widths", [(16, 32, 64), (4, 4, 9), (3, 8, 8)])
@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("in_shape", [(3, 32, 32), (1, 8, 8), (1, 1, 1)])
def test_runs(widths: tuple[int, int, int], shortcut: str, in_shape: tuple[int, int, int]) -> None:
    model = resnet_cifar(num_classes=5, in_shape=in_shape, depth=8, widths=widths, shortcut=shortcut)  # type: ignore[arg-type]
    assert model.eval()(torch.randn(2, *in_shape)).shape == (2, 5)


def test_shortcut_a_pads_as_in_the_original() -> None:
    x, residual = torch.randn(2, 16, 8, 8), torch.zeros(2, 32, 4, 4)
    out = PadShortcut(2, 8)(x, residual)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0 and out[:, 24:].abs().sum() == 0


def test_shortcut_a_follows_pruned_channels() -> None:
    """A block whose channels are halved equals the masked one once `front` counts the zeros that stay before."""
    torch.manual_seed(0)
    model = resnet_cifar(num_classes=3, in_shape=(3, 8, 8), depth=8, widths=(4, 8, 16)).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    block = model.layer2[0]
    keep_in, keep_out = torch.tensor([1, 2]), torch.tensor([0, 3, 4, 7])  # front and back lose one each
    assert isinstance(block.shortcut, PadShortcut)
    x = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    x[:, keep_in] = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    full = block(x)[:, keep_out]
    for name, module in block.named_children():
        if isinstance(module, nn.Conv2d):
            weight = module.weight[:, keep_in] if name == "conv1" else module.weight
            module.weight = nn.Parameter(weight[keep_out] if name == "conv2" else weight)
    bn = block.bn2
    bn.weight, bn.bias = nn.Parameter(bn.weight[keep_out]), nn.Parameter(bn.bias[keep_out])
    bn.running_mean, bn.running_var = bn.running_mean[keep_out], bn.running_var[keep_out]  # type: ignore[index]
    for wrong in (0, 2):
        block.shortcut.front = wrong
        assert not torch.allclose(block(x[:, keep_in]), full)
    block.shortcut.front = 1  # kept inputs 1 and 2 sit at outputs 3 and 4, behind one of the two front zeros
    assert torch.allclose(block(x[:, keep_in]), full, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "6 n \\+ 2"),
        ({"depth": 2}, "6 n \\+ 2"),
        ({"widths": (16, 32)}, "3 positive integers"),
        ({"widths": (16, 32, -1)}, "3 positive integers"),
        ({"widths": (16, 8, 64)}, "can't narrow"),
        ({"shortcut": "C"}, "shortcut is 'C'"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resnet_cifar(**{"num_classes": 10, "in_shape": (3, 32, 32), **arguments})
