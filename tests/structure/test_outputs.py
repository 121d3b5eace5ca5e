"""What a model returns stays what it is, in whatever it is wrapped."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prune_cli import shrink
from prune_cli.errors import SurgeryError
from prune_cli.structure.outputs import tensors_in
from tests.structure.networks import conv, example, randomise
from tests.structure.oracle import Body, shrunk_and_judged

Pair = namedtuple("Pair", "a b")


@dataclass(slots=True)
class Boxes:
    boxes: Tensor
    scores: Tensor


class Result:
    def __init__(self, x: Tensor) -> None:
        self.found, self.itself, self.speed = [Boxes(x, x.mean((2, 3)))], self, {"ms": 1.5}


class KeysCache:
    def __init__(self, x: Tensor) -> None:
        self.keys = x


WRAPPED: dict[str, Callable[[Tensor], Any]] = {
    "list of objects": lambda x: [Result(x)],
    "tensor beside objects": lambda x: (x.mean(), [Result(x)]),
    "object": Result,
    "named tuple": lambda x: Pair(1, x),
    "mapping": lambda x: UserDict(out={"x": x}),
    "slots": lambda x: {"one": Boxes(x, x)},
    "distribution": lambda x: torch.distributions.Normal(x, 1.0),
    "array": lambda x: x.numpy(),
    "object of arrays": lambda x: [Boxes(x.numpy(), None)],
}


@pytest.mark.parametrize("name", WRAPPED)
def test_channels_of_a_wrapped_output_stay(name: str) -> None:
    model = randomise(
        Body(lambda m, x: WRAPPED[name](m.c(m.b(m.a(x).relu()).relu())), a=conv(3, 8), b=conv(8, 16), c=conv(16, 6))
    )
    with torch.no_grad():
        small = shrink(model, example(2, 3, 4, 4))
    assert small.c.out_channels == 6 and small.a.out_channels == (8 if "array" in name else 4)


def test_a_cache_that_only_the_model_reads_is_no_output() -> None:
    model = randomise(Body(lambda m, x: {"x": m.c(m.a(x)), "past": KeysCache(m.a(x))}, a=conv(3, 8), c=conv(8, 6)))
    small = shrink(model, example(2, 3, 4, 4))
    assert small.a.out_channels == 4 and small(example(2, 3, 4, 4))["past"].keys.shape[1] == 4


def test_tensors_are_found_once_and_in_order() -> None:
    a, b = torch.zeros(1), torch.ones(2)
    loop: list[Any] = [a, {"b": b, "text": "x", "module": nn.Linear(2, 2)}]
    loop.append(loop)
    assert [t.shape for t in tensors_in(loop)] == [(1,), (2,)]
    assert not tensors_in(["a", 1, None, KeysCache(a)])


class Holder(nn.Module):
    """Calls a copy of what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(conv(3, 8), conv(8, 4))
        self.ready = [copy.deepcopy(self.inner)]

    def forward(self, x: Tensor) -> Tensor:
        return self.ready[0](x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Holder, "^no parameter of the model takes part"),
        (lambda: Body(lambda m, x: m.a(x).sum().item(), a=conv(3, 8)), "^the model returns no tensors"),
        (lambda: Body(lambda m, x: [str(m.a(x).shape), None], a=conv(3, 8)), "^the model returns no tensors"),
    ],
)
def test_what_cannot_be_compared_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        shrink(build().eval(), torch.zeros(1, 3, 4, 4))


def test_a_constant_as_long_as_the_channels_that_is_returned_stays() -> None:
    """As of a detector that found nothing on the example."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.b(m.a(x).relu())
        found = torch.zeros(len(x), 3, y.shape[1], dtype=x.dtype)
        for row in range(len(x)):
            if x[row].sum() > 1e6:
                found[row, 0] = y[row].mean((1, 2))
        return m.c(y.relu()).mean((2, 3)), found

    model = randomise(Body(forward, a=conv(3, 8), b=conv(8, 16), c=conv(16, 6)))
    small = shrunk_and_judged(model, example(2, 3, 4, 4)).model
    assert (small.a.out_channels, small.b.out_channels) == (4, 16)
    silent = randomise(Body(lambda m, x: (m.c(m.a(x)), x.new_zeros(m.a(x).shape[1])), a=conv(3, 8), c=conv(8, 6)))
    assert shrink(silent, example(2, 3, 4, 4)).a.out_channels == 8
