"""Where outputs are measured: norms and activations found by execution, in modules and functions alike."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_cli.criteria.sites import find, norms
from prune_cli.criteria.statistics import collect
from tests.criteria.test_weights import Residual

IMAGE = torch.zeros(1, 3, 8, 8)


class Functional(nn.Module):
    """conv, norm, ReLU as functions, the ReLU in place or not."""

    def __init__(self, act) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3)
        self.scale, self.shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("var", torch.rand(5) + 0.5)
        self.act = act

    def hidden(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.a(x), self.mean, self.var, self.scale, self.shift, self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.hidden(x))).flatten(1)


ACTS = {
    "module": nn.ReLU(),
    "in place module": nn.ReLU(inplace=True),
    "function": F.relu,
    "method": lambda x: x.relu(),
    "in place method": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "hardswish": F.hardswish,
    "swish by hand": lambda x: x * torch.sigmoid(x),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_before_the_norm_and_behind_the_activation(act):
    torch.manual_seed(0)
    model = Functional(act).eval()
    images = torch.randn(6, 3, 8, 8)
    found = {
        at: collect(model, [(images, torch.zeros(6))], ("mean", "not_positive"), None, IMAGE, at=at)["a.weight"]
        for at in ("pre_norm", "post_act")
    }
    with torch.no_grad():
        outputs = {"pre_norm": model.a(images), "post_act": act(model.hidden(images))}
    for at, values in outputs.items():
        assert torch.allclose(found[at]["mean"], values.clamp_min(0).double().mean((0, 2, 3)))
        assert torch.allclose(found[at]["not_positive"], (values <= 0).double().mean((0, 2, 3)))
    assert not torch.allclose(found["pre_norm"]["mean"], found["post_act"]["mean"])


def test_norms_are_found_by_execution_not_by_name_or_order_of_modules():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.BatchNorm2d(4)
            self.first = nn.Conv2d(3, 4, 3)
            self.second = nn.Conv2d(4, 4, 3)
            self.a = nn.BatchNorm2d(4)
            self.plain = nn.Conv2d(4, 4, 1)
            self.bare = nn.BatchNorm2d(4, affine=False)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.z(self.first(x)).relu()
            x = self.plain(self.a(self.second(x))).relu()
            return self.last(self.bare(x)).mean((2, 3))

    model = Shuffled()
    found = norms(model, IMAGE)
    assert set(found) == {"first.weight", "second.weight"}
    assert found["first.weight"].scale.data_ptr() == model.z.weight.data_ptr()
    assert found["second.weight"].shift.data_ptr() == model.a.bias.data_ptr()
    assert model.training


def test_a_shared_layer_with_two_norms_has_none_of_its_own():
    class Clustered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.conv(self.one(self.conv(x)).relu()))

    assert norms(Clustered(), IMAGE) == {}
    images = torch.randn(4, 3, 8, 8)
    model = Clustered().eval()
    got = collect(model, [(images, images)], ("mean",), None, IMAGE, at="pre_norm")["conv.weight"]["mean"]
    with torch.no_grad():
        first = model.conv(images)
        both = torch.cat([first, model.conv(model.one(first).relu())])
    assert torch.allclose(got, both.clamp_min(0).double().mean((0, 2, 3)))


def measured(model: nn.Module, name: str, images: Tensor, **arguments) -> Tensor:
    return collect(model, [(images, images)], ("mean",), None, images[:1], **arguments)[name]["mean"]


def test_behind_a_shortcut_and_before_a_pooled_relu():
    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        stem = model.stem(images)
        total = stem + model.outer(model.inner(stem).relu())
    for name, expected in [("outer", total.relu()), ("stem", stem)]:  # the stem's next reader is a convolution
        got = measured(model, f"{name}.weight", images)
        assert torch.allclose(got, expected.clamp_min(0).double().mean((0, 2, 3)), atol=1e-7)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        expected = pooled[:3](images)
    assert torch.allclose(measured(pooled, "0.weight", images), expected.double().mean((0, 2, 3)))
    late = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        expected = late[:2](images)
    assert torch.allclose(measured(late, "0.weight", images), expected.double().mean((0, 2, 3)))


class Tokens(nn.Module):
    """Layers on the last axis: a permuted convolution, layer norm, GELU, attention, and a transposed input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.across = nn.Linear(4, 5)

    def tokens(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x).permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).flatten(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.across(x.transpose(1, 2)).relu().mean((1, 2))


def test_channels_on_the_last_axis_and_layers_inside_attention():
    torch.manual_seed(0)
    model, images = Tokens().eval(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        tokens = model.tokens(images)
        up = F.gelu(model.up(tokens.flatten(1, 2)))
        mixed = tokens.flatten(1, 2) + model.down(up)
        out = model.attention(mixed, mixed, mixed, need_weights=False)[0]
        across = model.across(out.transpose(1, 2)).relu()
    for name, expected in [
        ("embed", tokens), ("up", up), ("down", mixed), ("attention.out_proj", out), ("across", across),
    ]:  # fmt: skip
        got = measured(model, f"{name}.weight", images)
        expected = expected.clamp_min(0).double().flatten(0, -2).mean(0)
        assert torch.allclose(got, expected, atol=1e-6), name
    assert set(norms(model, IMAGE)) == {"embed.weight"}
    assert torch.backends.mha.get_fastpath_enabled()


def test_norms_of_every_layer_of_a_residual_network():
    from prune_cli.models.resnet_cifar import resnet_cifar

    model = resnet_cifar(depth=20, num_classes=10, in_shape=(3, 32, 32))
    found = find(model.eval(), torch.zeros(1, 3, 32, 32))
    named = {site.weight: site.norm for site in found.sites}
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    scales = [named[f"{name}.weight"][0] for name in convolutions]
    assert None not in scales and len(set(scales)) == len(convolutions)


def test_a_bias_that_comes_in_an_operator_of_its_own_belongs_to_the_layer():
    """A transposed input of several images needs a product and an addition; that of one image does not."""
    torch.manual_seed(0)
    model, images = Tokens().eval(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        model.across.bias.add_(3)
        mixed = model.tokens(images).flatten(1, 2)
        mixed = mixed + model.down(F.gelu(model.up(mixed)))
        out = model.across(model.attention(mixed, mixed, mixed, need_weights=False)[0].transpose(1, 2))
    expected = out.clamp_min(0).double().flatten(0, -2).mean(0)
    parts = [(part, part) for part in images.split(2)]  # two images, then one
    for at in ("pre_norm", "post_act"):
        got = collect(model, parts, ("mean",), None, IMAGE, at=at)["across.weight"]["mean"]
        assert torch.allclose(got, expected, atol=1e-6)
