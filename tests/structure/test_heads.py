"""Attention that says nowhere how many heads it has: whole heads go where something cuts or marks the places inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.networks import example, randomise
from tests.structure.oracle import Body, shrunk_and_judged

SIZE = 4  # of a head


def cut(x: Tensor) -> Tensor:
    """(batch, tokens, heads * 4) -> (batch, heads, tokens, 4)."""
    return x.view(*x.shape[:2], -1, SIZE).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=x.dtype))
    half = x.shape[-1] // 2
    return x * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()


def attended(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(turned(q), turned(k), v, scale=0.3)
    return m.c(m.o(y.transpose(1, 2).flatten(2)).relu())


def separate(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return attended(m, cut(m.q(x)), cut(m.k(x)), cut(m.v(x)))


def shared_keys(m: Any, x: Tensor) -> Tensor:
    """Two queries for every key, as in decoders with groups of queries."""
    x = m.a(x)
    k, v = (cut(one)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for one in (m.k(x), m.v(x)))
    return attended(m, cut(m.q(x)), k, v)


def joint(m: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of a head side by side."""
    y = m.qkv(m.a(x))
    return attended(m, *y.view(*y.shape[:2], -1, 3 * SIZE).transpose(1, 2).chunk(3, -1))


def joint_groups(m: Any, x: Tensor) -> Tensor:
    """Two queries, their key and their value side by side, picked by a slice and by lists."""
    y = m.qkv(m.a(x))
    y = y.view(*y.shape[:2], -1, 4, SIZE)
    q, k, v = y[:, :, :, :-2], y[:, :, :, [-2]].expand(-1, -1, -1, 2, -1), y[:, :, :, [-1]].expand(-1, -1, -1, 2, -1)
    return attended(m, *(one.flatten(2, 3).transpose(1, 2) for one in (q, k, v)))


def linear(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*size) for name, size in sizes.items()}


CODES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], str, int]] = {
    "separate": (separate, linear(q=(16, 16), k=(16, 16), v=(16, 16), o=(16, 16)), "k", 8),
    "shared keys": (shared_keys, linear(q=(16, 32), k=(16, 16), v=(16, 16), o=(32, 16)), "k", 8),
    "joint": (joint, linear(qkv=(16, 48), o=(16, 16)), "qkv", 24),
    "joint groups": (joint_groups, linear(qkv=(16, 64), o=(32, 16)), "qkv", 32),
}


@pytest.mark.parametrize("name", CODES)
def test_half_of_the_heads_go(name: str) -> None:
    code, layers, layer, left = CODES[name]
    model = randomise(Body(code, a=nn.Linear(6, 16), c=nn.Linear(16, 3), **layers))
    small = shrunk_and_judged(model, example(2, 5, 6)).model
    assert small.get_submodule(layer).out_features == left and small.a.out_features == small.o.out_features == 8
