"""Small networks of the constructions that Torch-Pruning tests itself on, written anew by their shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import Case, Inputs, images, tokens


class Body(nn.Module):
    """Layers by name and a function that uses them."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def conv(a: int, b: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


def block(a: int, b: int, k: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(a, b, k, bias=False, **options), nn.BatchNorm2d(b), nn.ReLU())


def pooled(m: Any, x: Tensor) -> Tensor:
    return m.head(x.mean((2, 3)))


def residual(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return pooled(m, F.relu(x + m.c(m.b(x))))


def dense(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = torch.cat([x, layer(x)], 1)
    return pooled(m, x)


def squeeze(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return pooled(m, x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))))


def chunked(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x).chunk(2, 1)
    return pooled(m, m.b(a) * torch.sigmoid(b))


def unet(m: Any, x: Tensor) -> Tensor:
    a = m.a(x)
    b = m.b(F.max_pool2d(a, 2))
    return m.out(torch.cat([a, m.up(b)], 1))


def attention(m: Any, x: Tensor) -> Tensor:
    x = m.embed(x).flatten(2).transpose(1, 2)
    y = m.norm(x)
    x = x + m.attention(y, y, y, need_weights=False)[0]
    return m.head((x + m.mlp(m.norm2(x))).mean(1))


def recurrent(m: Any, x: Tensor) -> Tensor:
    return m.head(m.rnn(m.embed(x))[0][:, -1])


def shuffled(m: Any, x: Tensor) -> Tensor:
    return pooled(m, F.relu(m.b(F.channel_shuffle(m.a(x), 2))))


def two_inputs(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m.head(torch.cat([m.a(x).mean((2, 3)), m.b(y)], 1))


def flat(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.flatten(m.a(x), 1))


def token_classes(vocabulary: int = 50) -> Inputs:
    return tokens(7, vocabulary)


PICTURE = images(3, 16, 16)
HEAD = partial(nn.Linear, out_features=5)
TOYS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "sequential": (lambda: nn.Sequential(block(3, 16), block(16, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), HEAD(24)), PICTURE),
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), HEAD(32)), images(12)),
    "flatten": (lambda: Body(flat, a=block(3, 8), head=HEAD(8 * 256)), PICTURE),
    "residual": (lambda: Body(residual, a=block(3, 16), b=block(16, 12), c=conv(12, 16), head=HEAD(16)), PICTURE),
    "bottleneck": (lambda: Body(residual, a=block(3, 32), b=nn.Sequential(block(32, 8, 1), block(8, 8)), c=conv(8, 32, 1), head=HEAD(32)), PICTURE),
    "dense": (lambda: Body(dense, layers=nn.ModuleList(block(3 + 8 * i, 8) for i in range(4)), head=HEAD(35)), PICTURE),
    "depthwise": (lambda: nn.Sequential(block(3, 16), block(16, 16, groups=16), block(16, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), HEAD(24)), PICTURE),
    "depth multiplier": (lambda: nn.Sequential(block(3, 8), block(8, 16, groups=8), block(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), HEAD(8)), PICTURE),
    "grouped": (lambda: nn.Sequential(block(3, 16), block(16, 24, groups=4), block(24, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), HEAD(8)), PICTURE),
    "grouped residual": (lambda: Body(residual, a=block(3, 16), b=block(16, 16, groups=4), c=conv(16, 16, groups=2), head=HEAD(16)), PICTURE),
    "squeeze and excite": (lambda: Body(squeeze, a=block(3, 16), down=nn.Conv2d(16, 4, 1), up=nn.Conv2d(4, 16, 1), head=HEAD(16)), PICTURE),
    "chunk": (lambda: Body(chunked, a=block(3, 16), b=block(8, 8), head=HEAD(8)), PICTURE),
    "unet": (lambda: Body(unet, a=block(3, 8), b=block(8, 16), up=nn.ConvTranspose2d(16, 8, 2, 2), out=nn.Conv2d(16, 2, 1)), PICTURE),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, 2, groups=2), nn.Conv2d(8, 2, 1)), images(3, 8, 8)),
    "attention": (lambda: Body(attention, embed=nn.Conv2d(3, 16, 4, 4), norm=nn.LayerNorm(16), attention=nn.MultiheadAttention(16, 4, batch_first=True), norm2=nn.LayerNorm(16), mlp=nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), head=HEAD(16)), PICTURE),
    "encoder": (lambda: nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2), HEAD(16)), images(5, 6)),
    "norm first": (lambda: nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=True), HEAD(16)), images(5, 6)),
    "decoder": (lambda: Body(lambda m, x, y: m.head(m.d(m.e(x), m.e(y))), e=nn.Linear(6, 16), d=nn.TransformerDecoderLayer(16, 4, 24, batch_first=True), head=HEAD(16)), lambda b, g: (torch.randn(b, 4, 6, generator=g), torch.randn(b, 5, 6, generator=g))),
    "lstm": (lambda: Body(recurrent, embed=nn.Embedding(50, 12), rnn=nn.LSTM(12, 16, batch_first=True), head=HEAD(16)), token_classes()),
    "bidirectional lstm": (lambda: Body(recurrent, embed=nn.Embedding(50, 12), rnn=nn.LSTM(12, 16, 2, batch_first=True, bidirectional=True), head=HEAD(32)), token_classes()),
    "gru": (lambda: Body(recurrent, embed=nn.Embedding(50, 12), rnn=nn.GRU(12, 16, batch_first=True), head=HEAD(16)), token_classes()),
    "rnn": (lambda: Body(recurrent, embed=nn.Embedding(50, 12), rnn=nn.RNN(12, 16, 2, batch_first=True), head=HEAD(16)), token_classes()),
    "lstm of features": (lambda: Body(lambda m, x: m.head(m.rnn(m.a(x).flatten(2).transpose(1, 2))[0].mean(1)), a=block(3, 12), rnn=nn.LSTM(12, 16, batch_first=True), head=HEAD(16)), PICTURE),
    "projected lstm": (lambda: Body(recurrent, embed=nn.Embedding(50, 12), rnn=nn.LSTM(12, 16, batch_first=True, proj_size=8), head=HEAD(8)), token_classes()),
    "shuffle": (lambda: Body(shuffled, a=block(3, 16), b=conv(16, 12), head=HEAD(12)), PICTURE),
    "pixel shuffle": (lambda: nn.Sequential(block(3, 16), nn.PixelShuffle(2), conv(4, 8), nn.PixelUnshuffle(2), nn.Conv2d(32, 2, 1)), PICTURE),
    "layer norm": (lambda: nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.ReLU(), HEAD(32)), images(12)),
    "group norm": (lambda: nn.Sequential(conv(3, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 2, 1)), PICTURE),
    "instance norm": (lambda: nn.Sequential(conv(3, 16), nn.InstanceNorm2d(16, affine=True), nn.ReLU(), nn.Conv2d(16, 2, 1)), PICTURE),
    "rms norm": (lambda: nn.Sequential(nn.Linear(12, 32), nn.RMSNorm(32), nn.SiLU(), HEAD(32)), images(12)),
    "prelu": (lambda: nn.Sequential(conv(3, 16), nn.PReLU(16), conv(16, 8), nn.PReLU(), nn.Conv2d(8, 2, 1)), PICTURE),
    "glu": (lambda: nn.Sequential(nn.Linear(12, 32), nn.GLU(), HEAD(16)), images(12)),
    "two inputs": (lambda: Body(two_inputs, a=block(3, 8), b=nn.Linear(6, 12), head=HEAD(20)), lambda b, g: (torch.randn(b, 3, 8, 8, generator=g), torch.randn(b, 6, generator=g))),
    "several outputs": (lambda: Body(lambda m, x: {"a": m.b(m.a(x)), "b": [m.c(m.a(x))]}, a=block(3, 8), b=conv(8, 4), c=conv(8, 2)), PICTURE),
    "tied": (lambda: _tied(), token_classes()),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 3, 1)), images(4, 20)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 3, 1)), images(2, 6, 6, 6)),
    "bilinear": (lambda: Body(lambda m, x, y: m.head(F.relu(m.mix(m.a(x), m.b(y)))), a=nn.Linear(6, 12), b=nn.Linear(6, 10), mix=nn.Bilinear(12, 10, 16), head=HEAD(16)), lambda b, g: (torch.randn(b, 6, generator=g), torch.randn(b, 6, generator=g))),
    "embedding bag": (lambda: Body(lambda m, x: m.head(F.relu(m.a(m.embed(x)))), embed=nn.EmbeddingBag(50, 12), a=nn.Linear(12, 16), head=HEAD(16)), token_classes()),
    "upsampling": (lambda: nn.Sequential(block(3, 8), nn.Upsample(scale_factor=2, mode="bilinear"), conv(8, 8), nn.ReflectionPad2d(1), nn.Conv2d(8, 2, 3)), PICTURE),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(conv(3, 16)), nn.ReLU(), nn.Conv2d(16, 2, 1)), PICTURE),
    "old weight norm": (lambda: nn.Sequential(nn.utils.weight_norm(conv(3, 16)), nn.ReLU(), nn.Conv2d(16, 2, 1)), PICTURE),
    "weight norm of all": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 16), dim=None), nn.ReLU(), HEAD(16)), images(6)),
    "spectral norm": (lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(conv(3, 16)), nn.ReLU(), nn.Conv2d(16, 2, 1)), PICTURE),
}  # fmt: skip


def _tied() -> nn.Module:
    model = Body(
        lambda m, x: m.head(F.relu(m.a(m.embed(x)))),
        embed=nn.Embedding(50, 12),
        a=nn.Linear(12, 12),
        head=nn.Linear(12, 50),
    )
    model.head.weight = model.embed.weight
    return model


def cases() -> list[Case]:
    """All of them."""
    return [Case("toys", name, partial(_made, name), plain="spectral" in name) for name in TOYS]


def _made(name: str) -> tuple[nn.Module, Inputs]:
    build, inputs = TOYS[name]
    return build(), inputs
