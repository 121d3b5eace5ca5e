"""Modules made to break the engine: numbers that look like widths, data that decide, memory that is shared."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo import Case, Inputs, images, tokens
from zoo.toys import HEAD, PICTURE, Body, block, conv, pooled

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2], [1, 2, 3, 4, 5, 0, 3, 5]])


class Attributes(Body):
    """Layers by name, numbers as attributes."""

    def __init__(self, function: Callable[..., Any], layers: dict[str, Any], **numbers: Any) -> None:
        super().__init__(function, **layers)
        for name, value in numbers.items():
            setattr(self, name, value)


class Rotary(nn.Module):
    """Rotary attention with a buffer that forward never reads, as decoders of transformers keep it."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        frequencies = 1.0 / 100 ** (torch.arange(0, self.head_dim, 2) / self.head_dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angles = torch.outer(torch.arange(n, device=x.device).to(x.dtype), self.inv_freq)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        turn = lambda t: torch.cat([-t[..., self.head_dim // 2 :], t[..., : self.head_dim // 2]], -1)  # noqa: E731
        q, k = q * cos + turn(q) * sin, k * cos + turn(k) * sin
        if mask is not None and bool(mask.all()):
            mask = None
        bias = None if mask is None else torch.where(mask[:, None, None].bool(), 0.0, -1e9).to(x.dtype)
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, n, -1))


class Decoder(nn.Module):
    """Two blocks of rotary attention and gated layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.attentions = nn.ModuleList(Rotary() for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(32, 48) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(32, 48) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(48, 32) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(32) for _ in range(5))
        self.head = nn.Linear(32, 50)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for i in range(2):
            x = x + self.attentions[i](self.norms[2 * i](x), mask)
            y = self.norms[2 * i + 1](x)
            x = x + self.downs[i](F.silu(self.gates[i](y)) * self.ups[i](y))
        return self.head(self.norms[4](x))


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as in GPT-2."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Experts(nn.Module):
    """Two experts for each token, weights in one tensor, by grouped products."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.grouped = grouped
        self.gate, self.embed, self.head = nn.Linear(16, 4), nn.Linear(6, 16), HEAD(16)
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 16)), nn.Parameter(torch.randn(4, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        if not self.grouped:
            y = sum(
                torch.einsum("nio,ni->no", self.down.transpose(1, 2)[chosen[:, k]],
                             F.silu(torch.einsum("noi,ni->no", self.up[chosen[:, k]], x))) * weights[:, k, None]
                for k in range(2)
            )  # fmt: skip
            return self.head(x + y)
        order = chosen.flatten().argsort(stable=True)
        offsets = torch.bincount(chosen.flatten(), minlength=4).cumsum(0).to(torch.int32)
        rows = x[order // 2]
        y = torch._grouped_mm(rows, self.up.transpose(1, 2), offs=offsets)
        y = torch._grouped_mm(F.silu(y), self.down.transpose(1, 2), offs=offsets) * weights.flatten()[order, None]
        return self.head(x + torch.zeros_like(x).index_add_(0, order // 2, y))


def graph(how: str) -> Callable[..., Tensor]:
    """Messages along edges, summed at nodes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        source, target = (torch.cat([e + 6 * i for i in range(len(x) // 6)]) for e in EDGES)
        for layer in m.layers:
            message = F.relu(layer(x))[source]
            if how == "index_add":
                total = torch.zeros(len(x), message.shape[1], dtype=x.dtype).index_add_(0, target, message)
            elif how == "scatter_add":
                places = target[:, None].expand_as(message)
                total = message.new_zeros(len(x), message.shape[1]).scatter_add(0, places, message)
            else:
                places = target[:, None].expand(-1, message.shape[1])
                total = message.new_zeros(len(x), message.shape[1]).scatter_reduce(
                    0, places, message, how, include_self=False
                )
            x = total
        return m.head(x)

    return forward


def network(how: str) -> nn.Module:
    return Body(graph(how), layers=nn.ModuleList([nn.Linear(5, 16), nn.Linear(16, 24)]), head=HEAD(24))


def chosen_tokens(how: str) -> Callable[..., Tensor]:
    """Some tokens go on, by their scores."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        places = (x * m.score).sum(-1).argsort(1)[:, :3] if how != "fixed" else torch.arange(3).expand(len(x), 3)
        places = places.unsqueeze(-1)
        places = places.repeat(1, 1, x.shape[-1]) if how == "repeat" else places.expand(-1, -1, x.shape[-1])
        return m.head(F.relu(torch.gather(x, 1, places)).mean(1))

    return forward


def packed(m: Any, x: Tensor) -> Tensor:
    y = nn.utils.rnn.pack_padded_sequence(m.a(x), torch.tensor([5, 4, 3])[: len(x)], batch_first=True)
    return m.head(nn.utils.rnn.pad_packed_sequence(m.rnn(y)[0], batch_first=True)[0].mean(1))


@torch.inference_mode()
def inferred(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.norm(m.a(x))))


def conditional(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head(torch.cond(x.mean() > 0, lambda t: t.relu(), lambda t: 0.5 * t, (x,)))


def written_in_parts(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    y = torch.zeros(len(x), 16, *x.shape[2:], dtype=x.dtype)
    y[:, :8], y[:, 8:] = x, m.b(x)
    return m.head(y)


def sliced_by_number(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return pooled(m, torch.cat([x[:, :4], m.b(x[:, 4:])], 1))


def dead_ends(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    m.unused(y)
    return m.b(y)


def by_item(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.experts[int(m.gate(x.mean((2, 3))).sum(0).argmax().item())](x)


def counted(m: Any, x: Tensor) -> Tensor:
    m.calls = m.calls + 1
    return m.b(F.relu(m.a(x)))


def in_place(m: Any, x: Tensor) -> Tensor:
    x.mul_(0.5)
    return m.b(F.relu(m.a(x)))


def checkpointed(m: Any, x: Tensor) -> Tensor:
    return m.b(checkpoint(m.a, x, use_reentrant=False))


def einsums(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return torch.einsum("bchw,cd->bdhw", F.relu(x), m.w)


def bare(m: Any, x: Tensor) -> Tensor:
    return F.relu(F.relu(x @ m.w1) @ m.w2) @ m.w3


def lambda_layers(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    b, c, h, w = x.shape
    y = x.reshape(b, c, h * w)
    return pooled(m, x + (y @ (y.transpose(1, 2) @ y).softmax(-1)).reshape(b, c, h, w))


def film(m: Any, x: Tensor, y: Tensor) -> Tensor:
    scale, shift = m.film(y)[..., None, None].chunk(2, 1)
    return pooled(m, F.relu(m.a(x) * (1 + scale) + shift))


def hyper(m: Any, x: Tensor, y: Tensor) -> Tensor:
    x = m.a(x)
    kernel = m.make(y).view(len(x) * x.shape[1], 1, 3, 3)
    return pooled(m, F.conv2d(x.flatten(0, 1)[None], kernel, padding=1, groups=len(kernel)).view(x.shape))


def fourier(m: Any, x: Tensor) -> Tensor:
    return pooled(m, m.b(torch.fft.irfft2(torch.fft.rfft2(m.a(x)) * 0.5, s=x.shape[-2:])))


def windows(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    b, c, h, w = x.shape
    y = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    y = m.norm(y) @ m.norm(y).transpose(1, 2) @ y / math.sqrt(c)
    return pooled(m, y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w))


def sorted_channels(m: Any, x: Tensor) -> Tensor:
    return pooled(m, m.b(m.a(x).sort(1).values))


def topk_channels(m: Any, x: Tensor) -> Tensor:
    return pooled(m, m.b(m.a(x).topk(8, 1).values))


def flipped(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return pooled(m, m.b(x + x.flip(1)))


def rolled(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return pooled(m, m.b(x + x.roll(1, 1)))


def interleaved(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return pooled(m, m.b(torch.stack([x, 2 * x], 2).flatten(1, 2)))


def memory(m: Any, x: Tensor) -> Tensor:
    return m.head(F.softmax(m.a(x) @ m.keys.t(), -1) @ m.values)


def quantised(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).flatten(2).transpose(1, 2)
    return m.head(m.book[torch.cdist(x, m.book).argmin(-1)].mean(1))


def gated_by_number(m: Any, x: Tensor) -> Tensor:
    return m.head(F.group_norm(m.a(x), m.a.out_channels // 4))


def statistic_pool(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head(torch.cat([x.mean(2), x.std(2)], 1))


def maxout(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head(x.view(len(x), -1, 2).amax(-1))


def deep_supervision(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    y = m.b(x)
    return (m.x(x), m.y(y)) if m.training else m.y(y)


def ode(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    for _ in range(3):
        x = x + 0.1 * torch.tanh(m.b(x))
    return m.head(x)


def cells(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(len(x), m.cell.hidden_size, dtype=x.dtype)
    for step in x.unbind(1):
        state = m.cell(step, state)
    return m.head(state)


def length_16(m: Any, x: Tensor) -> Tensor:
    return m.o(m.c(x)[..., : m.max_len].relu()).mean(2)


def expanded(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head(torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.places)


def masked_tokens(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    x = torch.where((x.sum(-1, keepdim=True) > 0), x, m.token)
    return m.head(F.relu(x))


SEQUENCE = images(5, 6)
ADVERSARIAL: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "rotary decoder": (Decoder, tokens(7, 50)),
    "rotary decoder, masked": (Decoder, lambda b, g: (torch.randint(4, 50, (b, 7), generator=g), torch.tensor([[1] * 5 + [0] * 2] * b))),
    "rotary decoder, full mask": (Decoder, lambda b, g: (torch.randint(4, 50, (b, 7), generator=g), torch.ones(b, 7))),
    "Conv1D": (lambda: nn.Sequential(nn.Embedding(50, 16), Conv1D(32, 16), nn.GELU(), Conv1D(16, 32), nn.LayerNorm(16), HEAD(16)), tokens(5, 50)),
    "bare parameters": (lambda: Body(bare, w1=nn.Parameter(torch.randn(6, 16)), w2=nn.Parameter(torch.randn(16, 24)), w3=nn.Parameter(torch.randn(24, 5))), images(6)),
    "einsum with bare": (lambda: Body(einsums, a=conv(3, 16), w=nn.Parameter(torch.randn(16, 5))), PICTURE),
    "experts, grouped": (lambda: Experts(True), SEQUENCE),
    "experts, gathered": (lambda: Experts(False), SEQUENCE),
    **{f"graph {how}": (partial(network, how), images(6, 5)) for how in ("index_add", "scatter_add", "sum", "mean", "amax")},
    **{f"tokens gathered, {how}": (lambda how=how: Body(chosen_tokens(how), a=nn.Linear(6, 16), score=nn.Parameter(torch.randn(16)), head=HEAD(16)), SEQUENCE) for how in ("fixed", "chosen", "repeat")},
    **{f"packed {kind.__name__}": (lambda kind=kind: Body(packed, a=nn.Linear(6, 12), rnn=kind(12, 16, batch_first=True), head=HEAD(16)), SEQUENCE) for kind in (nn.LSTM, nn.GRU)},
    "inference mode": (lambda: Body(inferred, a=conv(3, 16), norm=nn.BatchNorm2d(16), b=conv(16, 4)), PICTURE),
    "torch.cond": (lambda: Body(conditional, a=nn.Linear(6, 16), head=HEAD(16)), images(6)),
    "written in parts": (lambda: Body(written_in_parts, a=conv(3, 8), b=conv(8, 8), head=conv(16, 4)), PICTURE),
    "sliced by a number": (lambda: Body(sliced_by_number, a=conv(3, 16), b=conv(12, 12), head=HEAD(16)), PICTURE),
    "dead end": (lambda: Body(dead_ends, a=conv(3, 16), unused=conv(16, 8), b=conv(16, 4)), PICTURE),
    "expert by item": (lambda: Body(by_item, a=conv(3, 8), gate=nn.Linear(8, 3), experts=nn.ModuleList(conv(8, 4) for _ in range(3))), PICTURE),
    "counts its calls": (lambda: Attributes(counted, {"a": conv(3, 16), "b": conv(16, 4)}, calls=0), PICTURE),
    "writes into its input": (lambda: Body(in_place, a=conv(3, 16), b=conv(16, 4)), PICTURE),
    "checkpoint": (lambda: Body(checkpointed, a=block(3, 16), b=conv(16, 4)), PICTURE),
    "non-local": (lambda: Body(lambda_layers, a=conv(3, 16), head=HEAD(16)), PICTURE),
    "film": (lambda: Body(film, a=conv(3, 16), film=nn.Linear(6, 32), head=HEAD(16)), lambda b, g: (torch.randn(b, 3, 8, 8, generator=g), torch.randn(b, 6, generator=g))),
    "hypernetwork": (lambda: Body(hyper, a=conv(3, 8), make=nn.Linear(6, 72), head=HEAD(8)), lambda b, g: (torch.randn(b, 3, 8, 8, generator=g), torch.randn(b, 6, generator=g))),
    "fourier": (lambda: Body(fourier, a=conv(3, 16), b=conv(16, 8), head=HEAD(8)), PICTURE),
    "windows": (lambda: Body(windows, a=conv(3, 16), norm=nn.LayerNorm(16), head=HEAD(16)), PICTURE),
    "sorted channels": (lambda: Body(sorted_channels, a=conv(3, 16), b=conv(16, 8), head=HEAD(8)), PICTURE),
    "topk channels": (lambda: Body(topk_channels, a=conv(3, 16), b=conv(8, 8), head=HEAD(8)), PICTURE),
    "flipped channels": (lambda: Body(flipped, a=conv(3, 16), b=conv(16, 8), head=HEAD(8)), PICTURE),
    "rolled channels": (lambda: Body(rolled, a=conv(3, 16), b=conv(16, 8), head=HEAD(8)), PICTURE),
    "interleaved": (lambda: Body(interleaved, a=conv(3, 16), b=conv(32, 8), head=HEAD(8)), PICTURE),
    "memory": (lambda: Body(memory, a=nn.Linear(6, 16), keys=nn.Parameter(torch.randn(10, 16)), values=nn.Parameter(torch.randn(10, 12)), head=HEAD(12)), images(6)),
    "codebook": (lambda: Body(quantised, a=conv(3, 16), book=nn.Parameter(torch.randn(10, 16)), head=HEAD(16)), PICTURE),
    "groups from a width": (lambda: Body(gated_by_number, a=conv(3, 16), head=conv(16, 4)), PICTURE),
    "statistics pooling": (lambda: Body(statistic_pool, a=nn.Conv1d(4, 16, 3), head=HEAD(32)), images(4, 20)),
    "maxout": (lambda: Body(maxout, a=nn.Linear(6, 16), head=HEAD(8)), images(6)),
    "deep supervision": (lambda: Body(deep_supervision, a=conv(3, 16), b=conv(16, 12), x=conv(16, 4), y=conv(12, 4)), PICTURE),
    "one layer many times": (lambda: Body(ode, a=nn.Linear(6, 16), b=nn.Linear(16, 16), head=HEAD(16)), images(6)),
    "gru cell": (lambda: Body(cells, cell=nn.GRUCell(6, 16), head=HEAD(16)), SEQUENCE),
    "rnn cell": (lambda: Body(cells, cell=nn.RNNCell(6, 16), head=HEAD(16)), SEQUENCE),
    "a length that equals a width": (lambda: Attributes(length_16, {"c": nn.Conv1d(4, 16, 3, padding=1), "o": nn.Conv1d(16, 5, 1)}, max_len=16), images(4, 8)),
    "tokens put in front": (lambda: Body(expanded, a=nn.Linear(6, 16), token=nn.Parameter(torch.randn(1, 1, 16)), places=nn.Parameter(torch.randn(1, 6, 16)), head=HEAD(16)), SEQUENCE),
    "masked tokens": (lambda: Body(masked_tokens, a=nn.Linear(6, 16), token=nn.Parameter(torch.randn(16)), head=HEAD(16)), SEQUENCE),
    "no parameters": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), PICTURE),
    "one layer": (lambda: nn.Linear(6, 5), images(6)),
    "features only": (lambda: nn.Sequential(block(3, 16), conv(16, 8)), PICTURE),
    "300 layers": (lambda: nn.Sequential(*[block(3 if i == 0 else 4, 4, 1) for i in range(300)], conv(4, 2)), images(3, 4, 4)),
    "data parallel": (lambda: nn.DataParallel(nn.Sequential(block(3, 16), conv(16, 4))), PICTURE),
    "scripted": (lambda: nn.Sequential(conv(3, 8), torch.jit.script(block(8, 16)), conv(16, 4)), PICTURE),
    "fx graph": (lambda: torch.fx.symbolic_trace(nn.Sequential(block(3, 16), conv(16, 4))), PICTURE),
    "batch norm without affine": (lambda: nn.Sequential(conv(3, 16), nn.BatchNorm2d(16, affine=False), conv(16, 4)), PICTURE),
    "constant border": (lambda: nn.Sequential(conv(3, 16), nn.ConstantPad2d(1, 0.5), nn.Conv2d(16, 4, 3)), PICTURE),
    "sigmoid before a convolution": (lambda: nn.Sequential(conv(3, 16), nn.Sigmoid(), conv(16, 4)), PICTURE),
    "local response": (lambda: nn.Sequential(conv(3, 16), nn.LocalResponseNorm(5), conv(16, 4)), PICTURE),
    "softmax over channels": (lambda: nn.Sequential(conv(3, 16), nn.Softmax2d(), conv(16, 4)), PICTURE),
    "max pool over channels": (lambda: Body(lambda m, x: m.b(F.max_pool1d(m.a(x), 2)), a=nn.Linear(6, 16), b=nn.Linear(8, 4)), SEQUENCE),
    "unfold": (lambda: Body(lambda m, x: m.b(F.unfold(m.a(x), 3, padding=1).transpose(1, 2)), a=conv(3, 8), b=nn.Linear(72, 4)), PICTURE),
    "parameter list": (lambda: Body(lambda m, x: F.relu(F.relu(x @ m.ws[0]) @ m.ws[1]) @ m.ws[2], ws=nn.ParameterList([torch.randn(6, 12), torch.randn(12, 12), torch.randn(12, 4)])), images(6)),
    "low rank": (lambda: Body(lambda m, x: m.head(F.relu(F.linear(x, m.u @ m.v))), u=nn.Parameter(torch.randn(16, 4)), v=nn.Parameter(torch.randn(4, 6)), head=HEAD(16)), images(6)),
    "bias by a table": (lambda: Body(lambda m, x: m.head(F.relu(m.a(x) + m.table(torch.arange(x.shape[1])))), a=nn.Linear(6, 16), table=nn.Embedding(9, 16), head=HEAD(16)), SEQUENCE),
    "kwargs": (lambda: Body(lambda m, *, pixels, extra=None: m.b(F.relu(m.a(pixels))), a=conv(3, 16), b=conv(16, 4)), lambda b, g: {"pixels": torch.randn(b, 3, 8, 8, generator=g), "extra": None}),
}  # fmt: skip


def cases() -> list[Case]:
    """All of them."""
    return [Case("adversarial", name, partial(_made, name)) for name in ADVERSARIAL]


def _made(name: str) -> tuple[nn.Module, Inputs]:
    build, inputs = ADVERSARIAL[name]
    return build(), inputs
