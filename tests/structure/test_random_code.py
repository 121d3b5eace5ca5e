"""Random chains of code that reads integers, data and modes: whatever comes together, small and masked network agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.structure.networks import conv, example, randomise
from tests.structure.oracle import judged, shrunk_and_judged

WIDTH = 16  # of every link: channels, and 4 x 4 places


class Link(nn.Module):
    """One step from (n, 16, 4, 4) to the same, with as many integers of 16, 8 and 4 as can be confused."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.n, self.c, self.k, self.heads, self.size = kind, WIDTH, WIDTH, 8, 4, 4
        self.parts, self.places, self.save, self.calls = [8, 8], (4, 12), [4, 8, 16], []
        self.a, self.b = conv(WIDTH, WIDTH, 3), conv(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return LINKS[self.kind](self, self.a(x)).relu()


def asserted(m: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == m.c
    return x


def counted(m: Any, x: Tensor) -> Tensor:
    m.calls.append(len(x))
    return x * (1.0 if len(m.calls) == 1 else 2.0)


def training(m: Any, x: Tensor) -> Tensor:
    return x.flip(1) if m.training else x


def swapped(m: Any, x: Tensor) -> Tensor:
    return torch.cat([x[:, m.k :], x[:, : m.k]], 1)


def split(m: Any, x: Tensor) -> Tensor:
    first, second = x.split(m.parts, 1)
    return torch.cat([second, first.relu()], 1)


LINKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda m, x: m.b(x),
    "residual": lambda m, x: x + m.b(x),
    "view": lambda m, x: x.view(-1, m.c, m.n).relu().view(-1, m.c, m.size, m.size),
    "tokens": lambda m, x: x.flatten(2).transpose(1, 2).reshape(-1, m.n, m.c).transpose(1, 2).reshape(-1, m.c, m.size, m.size),
    "heads": lambda m, x: x.unflatten(1, (m.heads, m.size)).mul(2).flatten(1, 2),
    "derived heads": lambda m, x: x.reshape(len(x), m.heads, x.shape[1] // m.heads, -1).mul(2).reshape(x.shape),
    "cut": lambda m, x: x[..., : m.n] + x[..., : m.size],
    "swapped": swapped,
    "split": split,
    "places": lambda m, x: torch.cat(x.flatten(2).split(m.places, 2)[::-1], 2).reshape(x.shape),
    "padded": lambda m, x: F.avg_pool2d(F.pad(x, (m.size,) * 4), 3),
    "zeros": lambda m, x: x + x.new_zeros(len(x), m.c, 1, 1),
    "asserted": asserted,
    "scaled": lambda m, x: x * m.c**-0.5,
    "steps": lambda m, x: x * sum(0.1 for _ in range(m.n)),
    "saved": lambda m, x: x * (2.0 if WIDTH in m.save else 1.0),
    "counted": counted,
    "turned by data": lambda m, x: x.flip(1) if x.mean() > 0.1 else x,
    "rolled by data": lambda m, x: x.roll(int(x.abs().sum() * 10) % 3, 1),
    "larger by data": lambda m, x: m.b(x) if x.abs().max().item() > 1 else x,
    "training": training,
    "gate": lambda m, x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "number of channels": lambda m, x: F.leaky_relu(x, 1 / x.shape[1]),
    "shuffled": lambda m, x: F.channel_shuffle(x, x.shape[1] // 4),
    "written": lambda m, x: torch.zeros_like(x).copy_(x),
}  # fmt: skip


class Chain(nn.Module):
    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.stem, self.links, self.head = conv(3, WIDTH), nn.Sequential(*map(Link, kinds)), conv(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.links(self.stem(x)))


def follows(kinds: list[str], ratio: float) -> None:
    model, given = randomise(Chain(kinds)), example(2, 3, 4, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    shrunk = shrunk_and_judged(model, given, ratio=ratio)
    for link in shrunk.model.links:
        assert (link.n, link.save, link.places) == (WIDTH, [4, 8, 16], (4, 12)) and not model.links[0].calls
    model.train(), shrunk.model.train()
    judged(model, shrunk, [given, -given])


@pytest.mark.parametrize("kind", LINKS)
def test_every_link_alone(kind: str) -> None:
    follows([kind], 0.5)


CHAINS = st.lists(st.sampled_from(sorted(LINKS)), min_size=2, max_size=5)


@settings(max_examples=12, deadline=None)
@given(CHAINS, st.sampled_from([0.25, 0.5, 0.8]))
def test_random_chains(kinds: list[str], ratio: float) -> None:
    follows(kinds, ratio)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(CHAINS, st.sampled_from([0.25, 0.5, 0.8]))
def test_many_random_chains(kinds: list[str], ratio: float) -> None:
    follows(kinds, ratio)
