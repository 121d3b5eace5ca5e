"""Convolutions of single stripes equal the masked ones, in value, gradient, cost and state."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_cli import masks as masking
from prune_cli.errors import SurgeryError
from prune_cli.layers import replacing, stripe_kernel, stripes
from prune_cli.layers.kind import Data
from prune_cli.layers.stripe_conv import StripeConv2d
from prune_cli.measure import cost as measure
from prune_cli.structure.lineage import Lineage, Replacement
from prune_cli.structure.rebuild import expanded

FORMS = ("_fused", "_by_position", "_spread_out", "forward")


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
@pytest.mark.parametrize("form", FORMS)
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


@pytest.mark.parametrize("form", FORMS)
def test_depthwise_equals_the_masked_convolution(form):
    for stride, filters in itertools.product((1, 2, (1, 3)), (6, 12)):
        small, masked = pair(nn.Conv2d(6, filters, 3, stride, padding=1, groups=6), 0.4)
        x = draw(2, 3, 6, 9, 8)
        with torch.no_grad():
            assert torch.allclose(getattr(small, form)(x), masked(x), atol=1e-5), (stride, filters)
        height, width = small.out_size(x)
        assert measure.cost(small, (6, 9, 8)).macs == small.macs(height, width) == len(small.stripes) * height * width


@pytest.mark.parametrize("form", FORMS)
def test_same_padding_other_modes_and_many_chunks(form, monkeypatch):
    monkeypatch.setattr("prune_cli.layers.stripe_kernel.CHUNK", 1)
    for arguments in (
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "circular"},
    ):
        small, masked = pair(nn.Conv2d(3, 5, 3, **arguments), 0.5)
        x = draw(2, 4, 3, 8, 9)
        with torch.no_grad():
            assert torch.allclose(getattr(small, form)(x), masked(x), atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
    part=st.sampled_from([0.05, 0.3, 0.8]),
    mode=st.sampled_from(["zeros", "zeros", "replicate"]),
    seed=st.integers(0, 99),
)
def test_every_form_equals_the_masked_convolution(
    data, kernel, stride, padding, dilation, groups, part, mode, seed, monkeypatch_module
):
    monkeypatch_module.setattr(stripe_kernel, "SHORT", data.draw(st.sampled_from([0, 10**9])))
    monkeypatch_module.setattr(stripe_kernel, "CHUNK", data.draw(st.sampled_from([1, 500, 10**6])))
    span = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
    size = [max(1, least - 2 * pad) + data.draw(st.integers(0, 7)) for least, pad in zip(span, padding, strict=True)]
    conv = nn.Conv2d(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, padding_mode=mode)
    small, masked = pair(conv.double(), part, seed)
    x = draw(seed, 2, 2 * groups, *size).double()
    with torch.no_grad():
        for form in FORMS:
            assert torch.allclose(getattr(small, form)(x), masked(x), atol=1e-12), form
        again = small.dense()
        assert torch.equal(again.weight, masked.weight)
        assert torch.equal(again(x), masked(x))


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("part", [0.0, 1.0])
@pytest.mark.parametrize("form", FORMS)
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


def test_the_form_follows_the_cost(monkeypatch):
    called = []

    def watched(form: str):
        run = getattr(StripeConv2d, form)
        return lambda self, x: called.append(form) or run(self, x)

    for form in ("_fused", "_by_position", "_spread_out"):
        monkeypatch.setattr(StripeConv2d, form, watched(form))
    few, _ = pair(nn.Conv2d(64, 64, 3, padding=1), 0.05)
    many, _ = pair(nn.Conv2d(64, 64, 3, padding=1), 0.95)
    x = draw(9, 4, 64, 16, 16)
    with torch.no_grad():
        few(x)
        many(x)
    few(x)
    assert called == ["_fused", "_spread_out", "_spread_out"]


def two() -> tuple[nn.Module, masking.Masks]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    generator = torch.Generator().manual_seed(1)
    masks = {
        "0.weight": torch.rand(6, 1, 3, 3, generator=generator) < 0.4,
        "2.weight": torch.rand(4, 1, 3, 3, generator=generator) < 0.4,
    }
    masking.apply(model, masks)
    return model, masks


def place(model: nn.Module, found: dict[str, Data]) -> Lineage:
    """Puts stripes in, and says so."""
    for name, data in found.items():
        replacing.place(model, name, "stripes", data)
    return Lineage(replaced={name: Replacement("stripes", data) for name, data in found.items()})


def test_networks_of_stripes_equal_masked_ones_and_go_back():
    model, masks = two()
    small = copy.deepcopy(model)
    lineage = place(small, stripes.fitting(model, masks))
    x = draw(5, 2, 3, 8, 8)
    with torch.no_grad():
        assert type(small[0]) is type(small[2]) is StripeConv2d
        assert torch.allclose(small(x), model(x), atol=1e-5)
        whole, again, plain = expanded(small, {}, lineage)
        assert type(whole[0]) is nn.Conv2d
        assert torch.equal(whole(x), model(x))
    assert not plain and type(small[0]) is StripeConv2d
    assert {name: mask.tolist() for name, mask in again.items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }
    twin = copy.deepcopy(model)
    place(twin, stripes.fitting(model, masks))
    twin.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x), small(x))


def test_masks_inside_stripes_survive_the_way_back():
    model, masks = two()
    fine = masks["2.weight"].expand(4, 6, 3, 3).clone()
    fine[:, 2] = False
    model[2].weight.data[:, 2] = 0
    numbers = stripes.fitting(model, {"2.weight": fine})
    small = copy.deepcopy(model)
    lineage = place(small, numbers)
    inside = small[2].rows(fine)
    assert inside.shape == small[2].weight.shape
    assert not inside[:, 2].any()
    _, again, _ = expanded(small, {"2.weight": inside}, lineage)
    assert torch.equal(again["2.weight"], fine)


class Clustered(nn.Module):
    """One convolution under two names, one whose weight is another's, one with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = self.first
        self.tied = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.other.weight = self.tied.weight
        self.hooked = nn.Conv2d(3, 3, 3, padding=1)
        self.hooked.register_forward_hook(lambda module, inputs, output: output + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hooked(self.other(self.tied(self.again(self.first(x)))))


def test_shared_tied_and_hooked_convolutions():
    model = Clustered()
    keep = torch.rand(3, 1, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = {f"{name}.weight": keep for name in ("first", "tied", "hooked")}
    masking.apply(model, masks)
    numbers = stripes.fitting(model, masks)
    assert set(numbers) == {"first"}
    small = copy.deepcopy(model)
    place(small, numbers)
    assert small.first is small.again
    x = draw(3, 2, 3, 6, 6)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "data", "message"),
    [
        ("nowhere", "stripes", {"stripes": "1"}, "no module 'nowhere'"),
        ("", "stripes", {"stripes": "1"}, "no module ''"),
        ("4", "stripes", {"stripes": "1"}, "'4', stripes: a Linear is no convolution"),
        ("0", "strips", {"stripes": "1"}, "did you mean 'stripes'"),
        ("0", "stripes", {"stripes": "3 2"}, "does not go on upwards"),
        ("0", "stripes", {"stripes": "3 54"}, "below 54"),
        ("0", "stripes", {"stripes": "-1 3"}, "is not an index"),
        ("0", "stripes", {"strips": "3"}, "the data do not fit the kind stripes"),
        ("0", "stripes", {"stripes": [1, 2]}, "is not an index"),
    ],
)
def test_stripes_that_do_not_fit_are_refused(name, kind, data, message):
    with pytest.raises(SurgeryError, match=message) as error:
        replacing.place(two()[0], name, kind, data)
    assert "\n" not in str(error.value)
