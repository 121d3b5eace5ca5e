from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as zoo

from prune_cli.errors import DataError
from prune_cli.measure.accuracy import accuracy
from prune_cli.measure.cost import cost, size_bytes
from prune_cli.measure.latency import latency
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.models.vgg import vgg
from prune_cli.training.batch_norm import recalibrate_bn

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


@pytest.mark.parametrize("in_shape", [(1, 3, 6, 6), (4, 3, 6, 6)])
def test_macs_grow_with_the_batch(in_shape: tuple[int, ...]) -> None:
    assert cost(nn.Conv2d(3, 2, 3), torch.zeros(in_shape)).macs == in_shape[0] * 2 * 16 * 27


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("vit_b_32", 64),
        ("swin_t", 64),
        ("swin_v2_t", 64),
        ("mobilenet_v2", 32),
        ("shufflenet_v2_x0_5", 32),
        ("convnext_tiny", 32),
        ("densenet121", 32),
        ("resnext50_32x4d", 32),
    ],
)
def test_macs_are_half_of_what_pytorch_counts(name: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    extra = {"image_size": side} if name.startswith("vit") else {}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = zoo.get_model(name, weights=None, **extra).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(2, 3, side, side, device="meta"))
    result = cost(model, torch.empty(2, 3, side, side, device="meta"))
    assert result.macs > 0 and result.flops == counter.get_total_flops()
    assert result.params == sum(p.numel() for p in model.parameters())


class Attention(nn.Module):
    """Attention by every road: module, functional, products and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mha(x, x, x, need_weights=False)[0]
        x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        scores = torch.einsum("bld,bmd->blm", x, x)
        return torch.baddbmm(x, scores, x) @ self.table


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("road", ["shapes", "values"])
def test_attention(length: int, road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention().eval()
    if road == "values":  # what the fallback does, where the path depends on values
        model.register_forward_pre_hook(lambda _, inputs: float(inputs[0].sum()) and None)
    x = torch.randn(3, length, 8)
    result = cost(model, x)
    square = 3 * length * length * 8
    macs = {layer.name: layer.macs for layer in result.layers}
    assert macs == {
        "": 4 * square + 3 * length * 8 * 4,  # attention (2), einsum, baddbmm, table
        "mha": 3 * length * 8 * 24 + 2 * square,
        "mha.out_proj": 3 * length * 64,
    }
    assert torch.backends.mha.get_fastpath_enabled()


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


# ------------------------------------------------------------------------------------------------- latency


def test_latency_restores_threads_and_leaves_the_model() -> None:
    model = nn.Linear(4, 4)
    threads = torch.get_num_threads()
    result = latency(model, torch.randn(8, 4), dtype=torch.bfloat16, threads=1, warmup=1, repeats=9)
    assert 0 < result.median_ms <= result.p95_ms
    assert result.throughput == pytest.approx(8e3 / result.median_ms)
    assert (result.batch_size, result.device, result.dtype, result.repeats) == (8, "cpu", "bfloat16", 9)
    assert torch.get_num_threads() == threads
    assert model.training and model.weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ accuracy


def test_accuracy_counts_every_example_once() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(103, 9, generator=generator)
    target = torch.randint(0, 9, (103,), generator=generator)
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    for size in (1, 10, 64, 103, 500):
        metrics = accuracy(model, zip(logits.split(size), target.split(size), strict=True))
        assert metrics.total == 103
        assert metrics.correct == int((logits.argmax(1) == target).sum())
        ranked = logits.argsort(1, descending=True)[:, :5]
        assert metrics.correct5 == sum(int(t in row) for t, row in zip(target, ranked, strict=True))
        assert metrics.loss == pytest.approx(float(F.cross_entropy(logits.double(), target)), rel=1e-6)
        assert metrics.acc1 == 100 * metrics.correct / 103
    assert model.training and model[0].training


def test_accuracy_with_a_loss_few_classes_and_named_logits() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> object:
            return type("Output", (), {"logits": x})()

    logits, target = torch.eye(3), torch.tensor([0, 1, 0])
    metrics = accuracy(
        Wrapped(), [(logits[:2], target[:2]), (logits[2:], target[2:])], lambda x, y: x.sum() / len(y) + 1
    )
    assert (metrics.correct, metrics.acc5, metrics.loss) == (2, 100.0, 2.0)


def test_accuracy_refuses_no_data_and_unknown_classes() -> None:
    with pytest.raises(DataError, match="no examples"):
        accuracy(nn.Identity(), [])
    with pytest.raises(DataError, match="class 5 in the data, the network has 3 outputs"):
        accuracy(nn.Identity(), [(torch.zeros(2, 3), torch.tensor([0, 5]))])


# -------------------------------------------------------------------------------------------- recalibration


def test_recalibration_is_the_mean_over_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.9), nn.BatchNorm2d(3, momentum=None))
    model[0].eval()
    weights = [parameter.clone() for parameter in model.parameters()]
    batches = [2 * torch.randn(6, 3, 4, 4) + 1, torch.randn(4, 3, 4, 4)]
    recalibrate_bn(model, [(batches[0], torch.zeros(6)), batches[1]])
    mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    var = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(model[0].running_mean, mean, atol=1e-6)
    assert torch.allclose(model[0].running_var, var, rtol=1e-5)
    # without dropout, what the second norm sees is normalised
    assert torch.allclose(model[2].running_mean, torch.zeros(3), atol=1e-5)
    assert [model[0].momentum, model[2].momentum] == [0.3, None]
    assert [module.training for module in model] == [False, True, True]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_recalibration_equals_pytorchs() -> None:
    model = resnet_cifar(num_classes=3, in_shape=(1, 8, 8), depth=8, widths=(2, 3, 4))
    batches = list(torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)).split(8))
    recalibrate_bn(model, batches)
    ours = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    torch.optim.swa_utils.update_bn(batches, model)
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())


def test_recalibration_without_batches_changes_nothing() -> None:
    model = nn.BatchNorm2d(2)
    model.running_mean.fill_(3)  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no images"):
        recalibrate_bn(model, [])
    assert model.running_mean.tolist() == [3, 3]  # type: ignore[union-attr]
    recalibrate_bn(nn.Linear(2, 2), [torch.zeros(1, 2)])


def test_count_by_shapes_equals_count_by_values() -> None:
    """functional_call on stand-ins and a real run see the same operators."""
    model = zoo.resnet18(weights=None, num_classes=5).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(model, {}, (torch.zeros(1, 3, 32, 32),))
    assert cost(model, (3, 32, 32)).flops == counter.get_total_flops()
