"""Convolutions of single stripes equal the masked ones, in value, gradient, cost and state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from prune_cli import masks as masking
from prune_cli import measure
from prune_cli.channels import analyse
from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import SurgeryError
from prune_cli.granularities.granularity import Granularity, select
from prune_cli.granularities.stripe import Stripe
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.stripe_conv import StripeConv2d, dead_filters, load_stripes, to_stripes, without_dead_filters
from prune_cli.surgery import structured_masks


def resnet20() -> nn.Module:
    return resnet_cifar(num_classes=10, in_shape=(3, 32, 32), depth=20)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(conv: nn.Conv2d, part: float, seed: int = 0) -> tuple[StripeConv2d, nn.Conv2d]:
    """The stripe layer and the masked convolution that it must equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    keep = torch.rand(conv.out_channels, *conv.kernel_size, generator=generator) < part
    small = StripeConv2d(conv, keep)
    with torch.no_grad():
        conv.weight.mul_(keep.unsqueeze(1))
    return small, conv


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("form", ["_fused", "_by_position"])
def test_equals_the_masked_convolution_for_every_geometry(form, dtype, tolerance):
    geometries = itertools.product((1, 2, (1, 3)), (0, 1, (2, 1)), (1, 2), (3, (2, 5)), (1, 2), (True, False))
    for stride, padding, dilation, kernel, groups, bias in geometries:
        conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bias, dtype=dtype)
        small, masked = pair(conv, 0.3)
        x = draw(1, 3, 4, 13, 11).to(dtype)
        with torch.no_grad():
            expected = masked(x)
            got = getattr(small, form)(x)
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= tolerance, (stride, padding, dilation, kernel, groups, bias)


@pytest.mark.parametrize("form", ["_fused", "_by_position"])
def test_same_padding_other_modes_and_many_chunks(form, monkeypatch):
    monkeypatch.setattr("prune_cli.stripe_conv.CHUNK", 1)
    for arguments in (
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "circular"},
    ):
        small, masked = pair(nn.Conv2d(3, 5, 3, **arguments), 0.5)
        x = draw(2, 4, 3, 8, 9)
        with torch.no_grad():
            assert torch.allclose(getattr(small, form)(x), masked(x), atol=1e-5)


@pytest.mark.parametrize("part", [0.0, 1.0])
@pytest.mark.parametrize("form", ["_fused", "_by_position"])
def test_none_and_all_stripes(form, part):
    small, masked = pair(nn.Conv2d(3, 5, 3, padding=1), part)
    x = draw(3, 2, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(getattr(small, form)(x), masked(x), atol=1e-5)


def test_gradients_are_those_of_the_masked_convolution():
    small, masked = pair(nn.Conv2d(3, 5, 3, stride=2, padding=1, dtype=torch.float64), 0.4)
    x, y = (draw(4, 2, 3, 9, 9).double().requires_grad_() for _ in range(2))
    small(x).square().sum().backward()
    masked(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad)
    dense = masked.weight.grad.permute(0, 2, 3, 1).reshape(45, 3)
    assert torch.allclose(small.weight.grad, dense[small.stripes])
    assert torch.allclose(small.bias.grad, masked.bias.grad)


def test_cost_is_that_of_the_stripes():
    small, _ = pair(nn.Conv2d(8, 6, 3, stride=2, padding=1, bias=False), 0.3)
    cost = measure.cost(small, (8, 16, 16))
    stripes = len(small.stripes)
    assert cost.macs == small.macs(8, 8) == stripes * 8 * 8 * 8
    assert cost.params == stripes * 8


def test_dense_weight_is_the_masked_weight():
    small, masked = pair(nn.Conv2d(4, 6, 3, groups=2), 0.3)
    assert torch.equal(small.dense_weight(), masked.weight)


def network() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = resnet20().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    masks = select(Granularity(Stripe(), 0.7), Criterion(weights.l1), model, torch.zeros(1, 3, 32, 32)).masks
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    return model, masks


def test_a_network_of_stripes_reloads_from_plain_tensors(tmp_path):
    model, masks = network()
    small = to_stripes(model, masks)
    x = draw(5, 2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-4)
    assert measure.params(small) < 0.35 * measure.params(model)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    state = torch.load(tmp_path / "small.pt", weights_only=True)
    again = load_stripes(resnet20(), state).eval()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_states_that_do_not_fit_are_refused():
    model, masks = network()
    state = to_stripes(model, masks).state_dict()
    key = next(key for key in state if key.endswith("stripes"))
    for value in (state[key].flip(0), state[key] + 10**6, state[key][:-1], state[key].float()):
        with pytest.raises(SurgeryError, match=r"stripes of|does not fit"):
            load_stripes(resnet20(), {**state, key: value})
    with pytest.raises(SurgeryError, match="no convolution 'nowhere'"):
        load_stripes(resnet20(), {**state, "nowhere.stripes": state[key]})


def test_dead_filters_are_removed_with_their_norms():
    model, masks = network()
    inner = next(name for name in masks if "conv1" in name and name.count(".") > 1)
    masks[inner] = masks[inner].clone()
    masks[inner][[0, 3, 5]] = False
    plan = analyse(model, torch.zeros(1, 3, 32, 32))
    dead = structured_masks(model, plan, dead_filters(plan, masks))
    assert (~dead[inner].flatten()).nonzero().flatten().tolist()[:3] == [0, 3, 5]
    masking.apply(model, masks)
    masking.apply(model, {name: mask for name, mask in dead.items() if ".bn" in name})  # biases of norms after them
    before = model.get_parameter(inner).shape[0]
    x = draw(6, 2, 3, 32, 32)
    shrunk, cut = without_dead_filters(model, masks, torch.zeros(1, 3, 32, 32))
    assert shrunk.model.get_parameter(inner).shape[0] == before - int((~dead[inner]).sum())
    with torch.no_grad():
        assert torch.allclose(shrunk.model(x), model(x), atol=1e-4)
        assert torch.allclose(to_stripes(shrunk.model, cut)(x), model(x), atol=1e-4)
    for name, mask in cut.items():
        mask.expand(shrunk.model.get_parameter(name).shape)


def test_a_family_never_dies_whole():
    model, masks = network()
    plan = analyse(model, torch.zeros(1, 3, 32, 32))
    keep = dead_filters(plan, {name: torch.zeros_like(mask) for name, mask in masks.items()})
    assert all(keep[family.units].sum() >= 1 for family in plan.families)
