"""Attention whose factor follows its width: undone in the rows that make the queries, or left alone where that is no way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from prune_cli import shrink
from prune_cli.structure.follow import analyse
from tests.structure.networks import example, randomise
from tests.structure.oracle import Body, shrunk_and_judged


def split(x: Tensor) -> Tensor:
    """(batch, tokens, 4 * d) -> (batch, 4, tokens, d)."""
    return x.view(*x.shape[:2], 4, -1).transpose(1, 2)


def joined(m: Any, y: Tensor, c: int) -> Tensor:
    return m.c(m.o(y.transpose(1, 2).reshape(len(y), -1, c)).mean(1))


def third_by_third(m: Any, x: Tensor) -> Tensor:
    q, k, v = map(split, m.qkv(x).chunk(3, -1))
    return (q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)).softmax(-1) @ v


def keys_first(m: Any, x: Tensor) -> Tensor:
    k, q, v = map(split, m.qkv(x).chunk(3, -1))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def head_by_head(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.qkv(x)).chunk(3, -1)
    return (q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)).softmax(-1) @ v


def bias_beside(m: Any, x: Tensor) -> Tensor:
    q, k, v = map(split, m.qkv(x).chunk(3, -1))
    return ((q + split(m.bias)) / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)).softmax(-1) @ v


def values_too(m: Any, x: Tensor) -> Tensor:
    q, k, v = map(split, m.qkv(x).chunk(3, -1))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v / math.sqrt(q.shape[-1])


def places_too(m: Any, x: Tensor) -> Tensor:
    q, k, v = map(split, m.qkv(x).chunk(3, -1))
    return ((q @ k.transpose(-1, -2) + m.places) / math.sqrt(q.shape[-1])).softmax(-1) @ v


CODES = {one.__name__: one for one in (third_by_third, keys_first, head_by_head, bias_beside, values_too, places_too)}


def network(attend: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """An embedding whose width is that of all heads together."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return joined(m, attend(m, x), x.shape[-1])

    model = Body(forward, a=nn.Linear(6, 16), qkv=nn.Linear(16, 48), o=nn.Linear(16, 12), c=nn.Linear(12, 3))
    model.bias, model.places = nn.Parameter(example(1, 1, 16)), nn.Parameter(example(1, 4, 5, 5))
    return randomise(model)


@pytest.mark.parametrize("name", CODES)
def test_what_cannot_be_undone_in_the_queries_keeps_its_channels_and_is_no_refusal(name: str) -> None:
    model = network(CODES[name])
    small = shrunk_and_judged(model, example(2, 5, 6)).model
    assert small.o.out_features == 6  # behind the attention, whatever happens in it
    assert shrink(model, example(2, 5, 6), criterion="random").o.out_features == 6


def test_queries_that_come_first_undo_the_factor_of_a_narrower_head() -> None:
    model = network(third_by_third)
    assert not analyse(model, example(2, 5, 6)).fallbacks.unscaled
    shrunk = shrunk_and_judged(model, example(2, 5, 6))
    assert shrunk.model.qkv.out_features == 24 and shrunk.model.a.out_features == 8
    assert {round(factor**2, 6) for factor in shrunk.lineage.scales["qkv.weight"]} == {0.5, 1.0}
