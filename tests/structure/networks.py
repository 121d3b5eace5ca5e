"""Small networks of every construction that the engine follows, and what its tests do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_cli.structure import analysis, lineage, rebuild, reference, surgery
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import lowest_units


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, evaluation, nothing special about any value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            low, high = (0.5, 1.5) if parameter.dim() == 1 and "weight" in name else (-0.5, 0.5)
            parameter.uniform_(low, high, generator=generator)
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.uniform_(-0.3, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.double().eval()


def example(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def halve(model: nn.Module, inputs: Any, ratio: float = 0.5) -> lineage.Shrunk:
    """Prunes and checks everything that must hold for any network."""
    plan = analyse(model, inputs)
    before = copy.deepcopy(model.state_dict())
    keep = lowest_units(plan, np.random.default_rng(3).random(plan.size), ratio)
    shrunk = surgery.remove_units(model, plan, keep)
    assert reference.difference(model, shrunk, inputs) < 1e-10
    assert shrunk.plan.count(shrunk.keep).params == parameters(shrunk.model)
    assert shrunk.plan.count(shrunk.plan.everything()).params == parameters(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = rebuild.rebuild(model, lineage.Lineage.from_dict(shrunk.lineage.to_dict()))
    assert all(torch.equal(value, again.state_dict()[n]) for n, value in shrunk.model.state_dict().items())
    for a, b in zip(outputs(shrunk.model, inputs), outputs(again, inputs), strict=True):
        assert torch.equal(a, b)
    return shrunk


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    with torch.no_grad():
        return tree_leaves(analysis.tracing.call_model(model, inputs))


class Body(nn.Module):
    """Layers by name and a function that uses them."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def conv(a: int, b: int, k: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


def shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def nhwc(m: Any, x: Tensor) -> Tensor:
    return m.fc(m.a(x).permute(0, 2, 3, 1).flatten(1))


def window(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    x = torch.roll(x, (1, 1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    return m.fc(x.reshape(-1, 4, c)).mean((0, 1))


def scale_buffer(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x) * m.scale)


def with_buffer() -> nn.Module:
    model = Body(scale_buffer, a=conv(3, 8), b=conv(8, 4))
    model.register_buffer("scale", torch.rand(8, 1, 1))
    return model


def tied() -> nn.Module:
    model = Body(lambda m, x: m.c(m.b(m.a(x)) + m.a2(x)), a=conv(3, 8), a2=conv(3, 8), b=conv(8, 8), c=conv(8, 2))
    model.a2.weight = model.a.weight
    return model


class Attention(nn.Module):
    """Joint projection, heads with a stored head size, as in most vision transformers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class CrossCovariance(nn.Module):
    """Attention of channels to channels: the softmax runs over channels."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 4, 1).unbind(0)
        attention = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.proj((attention @ v).permute(0, 3, 1, 2).reshape(b, n, c))


class Biased(nn.Module):
    """Keeps what it computed from a parameter in a cache, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = nn.Linear(3, 8), nn.Linear(8, 4), nn.Parameter(torch.rand(8))
        self.bias_cache: dict[str, Tensor] = {}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if "cpu" not in self.bias_cache:
            self.bias_cache["cpu"] = self.bias * 2
        self.last = self.a(x) + self.bias_cache["cpu"]
        return self.b(F.relu(self.last))


class Parts(nn.Module):
    """Splits by sizes that it stores."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = (10, 6, 4)
        self.a, self.b, self.c = conv(3, 20), conv(6, 10), conv(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = torch.split(self.a(x), self.parts, 1)
        return self.c(torch.cat([first + self.b(second), third], 1))


def gates(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))))


def shortcut_a(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.c(F.relu(m.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))))


class Standardised(nn.Conv2d):
    """Weight standardisation, by a batch norm or by hand."""

    def __init__(self, a: int, b: int, by_hand: bool) -> None:
        super().__init__(a, b, 3, padding=1)
        self.by_hand, self.gain = by_hand, nn.Parameter(torch.ones(b, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if self.by_hand:
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        else:
            flat = w.reshape(1, self.out_channels, -1)
            w = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True).reshape_as(w)
        return self._conv_forward(x, w, self.bias)


class Named(nn.Module):
    """Bounds of slices and sizes of splits that attributes name, as in dual paths and cascaded attention."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 14), conv(3, 18), conv(22, 4)
        self.first, self.key, self.value = 10, 4, 10
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.split:
            p, q = a.split([self.key, self.value], 1), b.split([self.key, self.key, self.value], 1)
            return self.c(torch.cat([p[0] * q[1], q[0], p[1], q[1]], 1))
        return self.c(torch.cat([a[:, : self.first] + b[:, : self.first], a[:, self.first :], b[:, self.first :]], 1))


class Nameless(nn.Module):
    """Attention whose number of heads has no name, and whose width is that of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.qkv, self.out = 4, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, self.h, c // self.h).transpose(1, 2) for t in self.qkv(x).split(c, 2))
        return x + self.out(((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


class GridLN(nn.Module):
    """A norm over channels written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return self.scale * centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()


def spectral(old: bool) -> nn.Module:
    norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(conv(3, 8)), nn.ReLU(), norm(conv(8, 8)), nn.ReLU(), conv(8, 4))


def conv_attention(m: Any, x: Tensor) -> Tensor:
    """One head of 1x1 convolutions; the scale is derived from the width."""
    q, k, v = m.qkv(m.a(x)).flatten(2).chunk(3, 1)
    return m.b((v @ (q.mT @ k * q.shape[1] ** -0.5).softmax(-1).mT).view(*v.shape[:2], *x.shape[2:]))


def shared_values(m: Any, x: Tensor) -> Tensor:
    """Multi-query attention: heads of queries, one set of keys and values."""
    q, k, v = m.q(m.a(x)), m.k(m.a(x)).unsqueeze(1), m.v(m.a(x)).unsqueeze(1)
    q = q.unflatten(-1, (-1, 4)).transpose(1, 2)
    return m.b(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def sampled(m: Any, x: Tensor) -> Tensor:
    grid = F.affine_grid(torch.eye(2, 3, dtype=x.dtype)[None], [1, 1, 4, 4], align_corners=False)
    return m.b(F.grid_sample(m.a(x), grid, align_corners=False))


def fourier(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.fft.irfft2(torch.fft.rfft2(m.a(x)) * torch.view_as_complex(m.weight), s=x.shape[-2:]))


def with_spectrum() -> nn.Module:
    body = Body(fourier, a=conv(3, 8), b=conv(8, 4))
    body.weight = nn.Parameter(torch.randn(8, 4, 3, 2))
    return body


def prototypes(m: Any, x: Tensor) -> Tensor:
    return torch.cdist(F.relu(m.a(x)), m.p.weight)


def unfolded(m: Any, x: Tensor) -> Tensor:
    return m.b(F.fold(F.unfold(m.a(x), 2, stride=2), (4, 4), 2, stride=2))


LSTM = nn.LSTM(8, 6, batch_first=True)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, float]] = {
    # name: network, inputs, largest share of the parameters that may stay at ratio 0.5
    "chain": (lambda: nn.Sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6, 3)), (1, 3, 6, 6), 0.55),
    "no bias": (lambda: nn.Sequential(conv(3, 8, bias=False), nn.PReLU(8), conv(8, 4)), (1, 3, 5, 5), 0.6),
    "residual": (lambda: Body(lambda m, x: m.c(F.relu(m.a(x) + m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 8), c=conv(8, 4)),
                 (1, 3, 5, 5), 0.45),
    "cat": (lambda: Body(lambda m, x: m.c(torch.cat([m.a(x), m.b(x), x], 1)), a=conv(3, 8), b=conv(3, 4), c=conv(15, 4)),
            (1, 3, 5, 5), 0.65),
    "depthwise": (lambda: nn.Sequential(conv(3, 8), conv(8, 8, 3, groups=8), nn.ReLU6(), conv(8, 4)), (1, 3, 5, 5), 0.55),
    "multiplier": (lambda: nn.Sequential(conv(3, 8), conv(8, 16, 3, groups=8), conv(16, 4)), (1, 3, 5, 5), 0.55),
    "grouped": (lambda: nn.Sequential(conv(3, 8), conv(8, 12, 3, groups=2), conv(12, 4)), (1, 3, 5, 5), 0.5),
    "transposed": (lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), conv(6, 4)), (1, 3, 4, 4), 0.5),
    "transposed grouped": (lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, groups=2), conv(6, 4)),
                           (1, 3, 4, 4), 0.7),
    "transposed depthwise": (lambda: nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, groups=8), conv(8, 4)),
                             (1, 3, 4, 4), 0.6),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8, 2, 1)),
               (1, 3, 9), 0.6),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8), nn.AvgPool3d(2), nn.Conv3d(8, 2, 1)),
               (1, 3, 4, 4, 4), 0.6),
    "channel shuffle": (lambda: Body(lambda m, x: m.b(shuffle(m.a(x), 4)), a=conv(3, 16), b=conv(16, 4)), (1, 3, 5, 5), 0.55),
    "channel shuffle module": (lambda: nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), conv(8, 4)), (1, 3, 5, 5), 0.56),
    "pixel shuffle": (lambda: nn.Sequential(conv(3, 16), nn.PixelShuffle(2), conv(4, 4)), (1, 3, 4, 4), 0.6),
    "pixel unshuffle": (lambda: nn.Sequential(conv(3, 4), nn.PixelUnshuffle(2), conv(16, 4)), (1, 3, 4, 4), 0.6),
    "glu": (lambda: nn.Sequential(conv(3, 16), nn.GLU(1), conv(8, 4)), (1, 3, 4, 4), 0.55),
    "chunk": (lambda: Body(lambda m, x: (lambda p: m.b(p[0] * p[1].sigmoid()))(m.a(x).chunk(2, 1)), a=conv(3, 16), b=conv(8, 4)),
              (1, 3, 4, 4), 0.55),
    "half slices": (lambda: Body(lambda m, x: (lambda y: m.b(y[:, : y.shape[1] // 2] + y[:, y.shape[1] // 2 :]))(m.a(x)),
                                 a=conv(3, 16), b=conv(8, 4)), (1, 3, 4, 4), 0.55),
    "literal slices": (lambda: Body(lambda m, x: (lambda y: m.c(torch.cat([m.b(y[:, :4]), y[:, 4:]], 1)))(m.a(x)),
                                    a=conv(3, 12), b=conv(4, 8), c=conv(16, 4)), (1, 3, 4, 4), 0.75),
    "literal view": (lambda: Body(lambda m, x: m.c(m.b(m.a(x)).view(1, 4, 4, 5, 5).sum(1)), a=conv(3, 8), b=conv(8, 16), c=conv(4, 4)),
                     (1, 3, 5, 5), 0.75),
    "literal split": (lambda: Body(lambda m, x: (lambda p: m.c(p[0] + m.b(p[1])))(torch.split(m.a(x), [8, 4], 1)),
                                   a=conv(3, 12), b=conv(4, 8), c=conv(8, 4)), (1, 3, 5, 5), 1.0),
    "interleaved": (lambda: Body(lambda m, x: (lambda y: m.b(torch.cat([y[:, 0::2], y[:, 1::2]], 1)))(m.a(x)),
                                 a=conv(3, 8), b=conv(8, 4)), (1, 3, 4, 4), 0.55),
    "stack": (lambda: Body(lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).sum(1)), a=conv(3, 8), b=conv(3, 8), c=conv(8, 4)),
              (1, 3, 4, 4), 0.55),
    "shortcut A": (lambda: Body(shortcut_a, a=conv(3, 8), b=conv(8, 16, 1, stride=2), c=conv(16, 4)), (1, 3, 4, 4), 0.75),
    "NHWC flatten": (lambda: Body(nhwc, a=conv(3, 8), fc=nn.Linear(8 * 16, 5)), (2, 3, 4, 4), 0.55),
    "NCHW flatten": (lambda: nn.Sequential(conv(3, 8), nn.Flatten(), nn.Linear(8 * 16, 5)), (2, 3, 4, 4), 0.55),
    "windows": (lambda: Body(window, a=conv(3, 8), fc=nn.Linear(8, 5)), (1, 3, 4, 4), 0.6),
    "tied weights": (tied, (1, 3, 4, 4), 0.5),
    "tied layer": (lambda: Body(lambda m, x: m.b(m.a(m.a(m.s(x)))), s=conv(3, 8), a=conv(8, 8), b=conv(8, 2)), (1, 3, 4, 4), 0.5),
    "functional weight": (lambda: Body(lambda m, x: m.b(F.conv2d(x, m.a.weight * 2, m.a.bias)), a=conv(3, 8), b=conv(8, 4)),
                          (1, 3, 4, 4), 0.55),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv(3, 8)), nn.ReLU(),
                                          nn.utils.parametrizations.weight_norm(conv(8, 4))), (1, 3, 4, 4), 0.6),
    "old weight norm": (lambda: nn.Sequential(nn.utils.weight_norm(conv(3, 8)), nn.ReLU(), conv(8, 4)), (1, 3, 4, 4), 0.6),
    "buffer": (with_buffer, (1, 3, 4, 4), 0.55),
    "group norm": (lambda: nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 4)), (1, 3, 4, 4), 0.6),
    "instance norm": (lambda: nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 4)), (1, 3, 4, 4), 0.6),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)), (2, 5, 3), 0.6),
    "layer norm plain": (lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4)),
                         (2, 5, 3), 0.6),
    "rms norm": (lambda: nn.Sequential(nn.Linear(3, 8), nn.RMSNorm(8), nn.Linear(8, 4)), (2, 5, 3), 0.6),
    "embedding": (lambda: nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), "tokens", 0.6),
    "squeeze excite": (lambda: Body(gates, a=conv(3, 8), down=conv(8, 4), up=conv(4, 8), b=conv(8, 4)), (1, 3, 4, 4), 0.55),
    "resize": (lambda: Body(lambda m, x: m.b(F.interpolate(F.pad(m.a(x), (1, 1, 0, 0), mode="reflect"), scale_factor=2.0)),
                            a=conv(3, 8), b=conv(8, 4)), (1, 3, 4, 4), 0.55),
    "lstm input": (lambda: Body(lambda m, x: m.fc(m.rnn(m.a(x))[0]), a=nn.Linear(3, 8), rnn=copy.deepcopy(LSTM), fc=nn.Linear(6, 4)),
                   (2, 5, 3), 0.75),
    "multihead attention": (lambda: Body(lambda m, x: m.b(m.att(*[m.a(x)] * 3, need_weights=False)[0] + m.a(x)), a=nn.Linear(3, 8),
                                         att=nn.MultiheadAttention(8, 2, batch_first=True), b=nn.Linear(8, 4)), (2, 5, 3), 0.4),
    "heads": (lambda: nn.Sequential(nn.Linear(3, 16), Attention(16, 4), nn.LayerNorm(16), nn.Linear(16, 4)), (2, 5, 3), 0.4),
    "channel attention": (lambda: nn.Sequential(nn.Linear(3, 16), CrossCovariance(16, 4), nn.Linear(16, 4)), (2, 5, 3), 0.4),
    "softmax over channels": (lambda: Body(lambda m, x: m.b(m.a(x) * m.a(x).softmax(1)), a=conv(3, 8), b=conv(8, 4)),
                              (1, 3, 4, 4), 0.55),
    "einsum": (lambda: Body(lambda m, x: m.b(torch.einsum("bnc,dc->bnd", m.a(x), m.w.weight)), a=nn.Linear(3, 8), w=nn.Linear(8, 6),
                            b=nn.Linear(6, 4)), (2, 5, 3), 0.75),
    "standardised weight": (lambda: nn.Sequential(Standardised(3, 8, False), nn.ReLU(), Standardised(8, 8, False), nn.ReLU(), conv(8, 4)),
                            (1, 3, 4, 4), 0.5),
    "standardised by hand": (lambda: nn.Sequential(conv(3, 8), nn.ReLU(), Standardised(8, 8, True), nn.BatchNorm2d(8), conv(8, 4)),
                             (1, 3, 4, 4), 0.5),
    "standardised after sigmoid": (lambda: nn.Sequential(conv(3, 8), nn.Sigmoid(), Standardised(8, 4, True)), (1, 3, 4, 4), 1.0),
    "weight that is never 0": (lambda: Body(lambda m, x: m.b(torch.sigmoid(F.conv2d(m.a(x).sigmoid(), m.w.weight.softmax(0)))),
                                            a=conv(3, 8), w=conv(8, 8), b=conv(8, 4)), (1, 3, 4, 4), 1.0),
    "named slices": (lambda: Named(False), (1, 3, 4, 4), 0.6),
    "named splits": (lambda: Named(True), (1, 3, 4, 4), 0.65),
    "nameless heads": (lambda: nn.Sequential(nn.Linear(3, 16), Nameless(), nn.Linear(16, 4)), (2, 5, 3), 0.4),
    "norm by hand": (lambda: nn.Sequential(conv(3, 8), GridLN(), conv(8, 4)), (1, 3, 4, 4), 0.6),
    "layer norm over two axes": (lambda: nn.Sequential(nn.Conv1d(3, 8, 1), nn.LayerNorm([8, 5]), nn.Conv1d(8, 4, 1)), (2, 3, 5), 0.6),
    "spectral norm": (lambda: spectral(False), (1, 3, 4, 4), 0.5),
    "old spectral norm": (lambda: spectral(True), (1, 3, 4, 4), 0.5),
    "scale of a convolution's attention": (lambda: Body(conv_attention, a=conv(3, 8), qkv=conv(8, 24), b=conv(8, 4)), (1, 3, 4, 4), 0.85),
    "mean by its number": (lambda: Body(lambda m, x: m.b(m.a(x) * (m.a(x).sum(1, keepdim=True) / m.a(x).shape[1])), a=conv(3, 8),
                                        b=conv(8, 4)), (1, 3, 4, 4), 1.0),
    "cross attention": (lambda: Body(lambda m, x: m.b(m.att(m.a(x), m.c(x), m.c(x))[0]), a=nn.Linear(3, 8), c=nn.Linear(3, 6),
                                     att=nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True), b=nn.Linear(8, 4)), (2, 5, 3), 0.4),
    "unequal parts": (lambda: Body(lambda m, x: (lambda y: m.c(torch.cat([m.a(y[:, :2]), m.b(y[:, 2:])], 1)))(m.i(x)), i=conv(3, 16),
                                   a=conv(2, 2, groups=2), b=conv(14, 14, groups=14), c=conv(16, 4)), (1, 3, 4, 4), 0.9),
    "multi-query attention": (lambda: Body(shared_values, a=nn.Linear(3, 8), q=nn.Linear(8, 16), k=nn.Linear(8, 4), v=nn.Linear(8, 4),
                                           b=nn.Linear(16, 4)), (2, 5, 3), 0.6),
    "constant kernel": (lambda: Body(lambda m, x: (lambda y: m.b(F.conv2d(y, torch.full((1, 1, 2, 2), 0.25, dtype=y.dtype).repeat(
        y.shape[1], 1, 1, 1), groups=y.shape[1])))(m.a(x)), a=conv(3, 8), b=conv(8, 4)), (1, 3, 4, 4), 0.6),
    "blur": (lambda: Body(lambda m, x: (lambda y: m.b(F.conv2d(y, m.k.running_var.view(1, 1, 2, 2).repeat(y.shape[1], 1, 1, 1),
                                                               groups=y.shape[1])))(m.a(x)), a=conv(3, 8), b=conv(8, 4),
                          k=nn.BatchNorm1d(4, affine=False)), (1, 3, 4, 4), 0.65),
    "sum of deviations": (lambda: Body(lambda m, x: m.b(m.a(x)) + m.a(x).std((2, 3), keepdim=True).sum(1, keepdim=True), a=conv(3, 8),
                                       b=conv(8, 4)), (1, 3, 4, 4), 0.6),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(10, 8), nn.Linear(8, 4)), "tokens", 0.6),
    "grid sample": (lambda: Body(sampled, a=conv(3, 8), b=conv(8, 4)), (1, 3, 4, 4), 0.6),
    "fourier": (with_spectrum, (1, 3, 4, 4), 0.6),
    "distances": (lambda: Body(prototypes, a=nn.Linear(3, 8), p=nn.Linear(8, 5)), (2, 3), 0.6),
    "unfold and fold": (lambda: Body(unfolded, a=conv(3, 8), b=conv(8, 4)), (1, 3, 4, 4), 0.6),
    "mean over channels": (lambda: Body(lambda m, x: m.b(m.a(x) * torch.sigmoid(m.a(x).mean(1, keepdim=True))), a=conv(3, 8),
                                        b=conv(8, 4)), (1, 3, 4, 4), 1.0),
}  # fmt: skip
