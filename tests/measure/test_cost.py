from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as zoo

from prune_cli.measure.cost import cost, size_bytes
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.models.vgg import vgg

# ------------------------------------------------------------------------------------------ params and MACs


def test_hand_counted_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.ConvTranspose2d(8, 6, 4, stride=2),
        nn.Conv2d(6, 4, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    result = cost(model, (3, 16, 16))
    macs = {layer.name: layer.macs for layer in result.layers}
    assert macs == {
        "0": 8 * 8 * 8 * (3 * 9),
        "1": 0,
        "2": 8 * 8 * 8 * 9,
        "3": 8 * 8 * 8 * (6 * 16),  # every input element times its 6 x 4 x 4 kernel
        "4": 4 * 18 * 18 * 3,
        "7": 40,
    }
    assert result.macs == sum(macs.values()) and result.flops == 2 * result.macs
    assert [layer.output_shape for layer in result.layers][:2] == [(1, 8, 8, 8), (1, 8, 8, 8)]
    assert result.layers[0].weight_shape == (8, 3, 3, 3) and result.layers[0].kind == "Conv2d"
    assert result.params == sum(p.numel() for p in model.parameters())
    assert result.bytes == size_bytes(model) == 4 * (result.params + 16) + 8


class Clustered(nn.Module):
    """One linear layer used twice, once through its weight, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.rnn = nn.LSTM(4, 6, batch_first=True)
        self.back = nn.Linear(6, 4)
        self.decode = nn.Linear(4, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.back(self.rnn(self.embed(tokens))[0])
        return self.decode(x) + F.linear(x, self.decode.weight)


def test_ties_recurrence_and_functional_use() -> None:
    model = Clustered()
    result = cost(model, torch.zeros(2, 5, dtype=torch.long))
    assert result.params == 28 + 4 * 6 * (4 + 6 + 2) + 28
    macs = {layer.name: layer.macs for layer in result.layers}
    # the tied weight belongs to its first module
    assert macs == {"embed": 2 * 2 * 5 * 28, "rnn": 2 * 5 * 24 * 10, "back": 2 * 5 * 24}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=3, max_size=3), st.integers(0, 2**16))
def test_masked_cost_equals_the_cost_of_the_small_network(widths: list[int], seed: int) -> None:
    """Masks over producer, norm and consumers leave exactly the MACs and parameters of the shrunk network."""
    generator = torch.Generator().manual_seed(seed)
    full, small = [8, "M", 8, 8], [widths[0], "M", *widths[1:]]
    model = vgg(num_classes=3, in_shape=(2, 6, 6), depth=None, cfg=full)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1)
    keeps = [torch.ones(2, dtype=torch.bool)]
    for width in widths:
        keeps.append(
            torch.zeros(8, dtype=torch.bool).index_fill_(0, torch.randperm(8, generator=generator)[:width], True)
        )
    masks = {"classifier.weight": keeps[-1][None]}
    for index, position in enumerate([0, 4, 7]):
        out, into = keeps[index + 1], keeps[index]
        masks[f"features.{position}.weight"] = (out[:, None] & into[None])[:, :, None, None]
        for name in (
            f"features.{position}.bias",
            f"features.{position + 1}.weight",
            f"features.{position + 1}.bias",
        ):
            masks[name] = out
    expected = cost(vgg(num_classes=3, in_shape=(2, 6, 6), depth=None, cfg=small), (2, 6, 6))
    masked = cost(model, (2, 6, 6), masks)
    assert (masked.macs_nonzero, masked.params_nonzero) == (expected.macs, expected.params)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter *= masks[name]
    zeroed = cost(model, (2, 6, 6))
    assert (zeroed.macs_nonzero, zeroed.params_nonzero) == (expected.macs, expected.params)
    assert (zeroed.macs, zeroed.params) == (masked.macs, masked.params)
    assert zeroed.params == sum(p.numel() for p in model.parameters())
    assert zeroed.sparsity == 1 - zeroed.params_nonzero / zeroed.params


def test_part_of_a_parameter_counts_by_its_own_zeros() -> None:
    """Cross-attention cuts one projection weight in parts: each part has its own density."""
    mha = nn.MultiheadAttention(4, 1, bias=False, batch_first=True)
    with torch.no_grad():
        mha.in_proj_weight.fill_(1)
        mha.in_proj_weight[:4] = 0  # the part of the query
    query, key = torch.zeros(1, 2, 4), torch.zeros(1, 10, 4)
    result = cost(mha, (query, key, key))
    layer = result.layers[0]
    assert layer.macs == 2 * 16 + 2 * 10 * 16 + 2 * (2 * 10 * 4)
    assert layer.macs - layer.macs_nonzero == 2 * 16


def test_cost_on_meta_counts_without_values() -> None:
    with torch.device("meta"):
        model = resnet_cifar(num_classes=10, in_shape=(3, 32, 32))
    result = cost(model, (3, 32, 32))
    assert (result.params, result.params_nonzero, result.macs) == (269_722, 269_722, 40_551_040)


def test_cost_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout())
    model.train()
    model[1].eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cost(model, (2, 5, 5))
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    assert cost(model, (2, 5, 5)) == cost(model, (2, 5, 5))


def test_channels_last_weights_and_masks() -> None:
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    mask = torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) > 0.6
    assert cost(conv, (4, 5, 5), {"weight": mask}).macs_nonzero == 9 * int(mask.sum())


def test_count_by_shapes_equals_count_by_values() -> None:
    """functional_call on stand-ins and a real run see the same operators."""
    model = zoo.resnet18(weights=None, num_classes=5).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(model, {}, (torch.zeros(1, 3, 32, 32),))
    assert cost(model, (3, 32, 32)).flops == counter.get_total_flops()


def test_what_a_forward_pass_keeps_as_an_attribute_is_put_back():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.cells = nn.Linear(4, 3), torch.ones(3)

        def forward(self, x):
            y = self.linear(x)
            self.cells = self.cells.to(y.device)
            return y + self.cells

    model = Caches()
    assert cost(model, (4,)).macs == 12 and not model.cells.is_meta
    assert cost(model, {"x": torch.zeros(2, 4)}).macs == 24 and model(torch.zeros(1, 4)).shape == (1, 3)
