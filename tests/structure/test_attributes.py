"""Integers of modules: what was read as a width follows, what only looks like one stays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.structure.networks import conv, example, randomise
from tests.structure.oracle import Body, shrunk_and_judged

Build = Callable[[], nn.Module]


class Longest(nn.Module):
    """Cuts the length of its input, not its channels."""

    def __init__(self, compare: bool) -> None:
        super().__init__()
        self.max_len, self.compare = 16, compare
        self.c, self.o = nn.Conv1d(4, 16, 3, padding=1), nn.Conv1d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        if not self.compare or x.shape[-1] > self.max_len:
            x = x[..., : self.max_len]
        return self.o(x.relu()).mean(2)


def lines(n: int = 8) -> Tensor:
    return example(2, 4, n)


def longer() -> list[Tensor]:
    return [example(2, 4, n) for n in (8, 16, 24, 40)]


@pytest.mark.parametrize("compare", [False, True])
def test_a_length_that_equals_a_width_stays_also_for_longer_inputs(compare: bool) -> None:
    shrunk = shrunk_and_judged(randomise(Longest(compare)), lines(), longer())
    assert shrunk.model.max_len == 16 and shrunk.model.c.out_channels == 8


def tokens(m: Any, x: Tensor) -> Tensor:
    """As many tokens as channels."""
    y = m.a(x).view(-1, m.n, m.c)
    return m.b((y * m.scale).view(-1, m.n, m.c)).mean(1)


def with_scale(**held: Any) -> nn.Module:
    model = Body(tokens, a=nn.Linear(3, 16), b=nn.Linear(16, 4), **held)
    model.scale = nn.Parameter(torch.rand(16, 16))
    return model


def asserted(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    assert x.shape[1] == m.width, "another width"
    return m.b(x.relu())


def raises(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    if x.shape[1] != m.width:
        raise ValueError("another width")
    return m.b(x.relu())


def zeros(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(x.relu() + x.new_zeros(len(x), m.width, 1, 1))


def heads(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    b, c = x.shape[:2]
    return m.b((x.view(b, m.heads, c // m.heads, -1) * 2).reshape(b, c, *x.shape[2:]))


def saved(m: Any, x: Tensor) -> Tensor:
    kept = []
    for number, layer in enumerate((m.a, m.b, m.c)):
        x = layer(x).relu()
        if number in m.save:
            kept.append(x)
    return x if 16 not in m.save else x * 2


def steps(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    for _ in range(m.steps):
        x = x * 0.9
    return m.b(x)


def spatial_pad(m: Any, x: Tensor) -> Tensor:
    return m.b(F.pad(m.a(x), (m.border, m.border, 0, 0)))


def channel_pad(m: Any, x: Tensor) -> Tensor:
    return m.b(F.pad(m.a(x), (0, 0, 0, 0, m.before, m.after)).relu())


def spatial_split(m: Any, x: Tensor) -> Tensor:
    first, second = torch.split(m.a(x).flatten(2), m.parts, 2)
    return m.b((first.sum(2) + second.mean(2))[..., None, None])


def channel_split(m: Any, x: Tensor) -> Tensor:
    first, second = torch.split(m.a(x), m.parts, 1)
    return m.b(torch.cat([first, second.relu()], 1))


def depthwise(m: Any, x: Tensor) -> Tensor:
    return m.b(F.conv2d(m.a(x), m.k.weight, groups=m.dim))


def scaled(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x) * m.dim**-0.5)


def position(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(x + torch.linspace(0, 1, m.n, dtype=x.dtype).view(1, 1, 4, 4))


def modulo(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * (1.0 if m.i % m.n else 2.0)


def expanded(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x) * x.mean(1, keepdim=True).expand(-1, m.dim, -1, -1))


def unflattened(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).unflatten(1, (m.heads, m.size)).relu().flatten(1, 2))


def added_to_a_size(m: Any, x: Tensor) -> Tensor:
    x = m.a(x).movedim(1, -1)
    return m.b(x.view(x.size()[:-1] + (m.heads, m.size)).relu().flatten(-2).movedim(-1, 1))  # noqa: RUF005


def helper(block: Any, x: Tensor) -> Tensor:
    return x.view(len(x), block.o, -1)


def by_helper(m: Any, x: Tensor) -> Tensor:
    return m.b(helper(m.block, m.a(x)).relu().view(len(x), -1, *x.shape[2:]))


def both_sides(m: Any, x: Tensor) -> Tensor:
    """The branch that the example does not take reads the number of labels."""
    y = m.b(m.a(x).relu()).mean((2, 3))
    return y if x.shape[-1] < 100 else y.view(-1, m.num_labels, 2)


def negative(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.b(torch.cat([x[:, : -m.last], x[:, -m.last :].relu()], 1))


def two(**held: Any) -> dict[str, Any]:
    return {"a": conv(3, 16), "b": conv(16, 4), **held}


# name: network, input, attributes that stay, attributes that follow (or whose channels stay)
CASES: dict[str, tuple[Build, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "tokens and channels": (lambda: with_scale(n=16, c=16), (2, 16, 3), {"n": 16}, {"c": 8}),
    "asserted": (lambda: Body(asserted, **two(width=16)), (2, 3, 4, 4), {}, {"width": 8}),
    "raises": (lambda: Body(raises, **two(width=16)), (2, 3, 4, 4), {}, {"width": 8}),
    "zeros": (lambda: Body(zeros, **two(width=16)), (2, 3, 4, 4), {}, {"width": 8}),
    "heads": (lambda: Body(heads, **two(heads=4)), (2, 3, 4, 4), {}, {}),
    "saved layers": (lambda: Body(saved, a=conv(3, 16), b=conv(16, 16), c=conv(16, 4), save=[1, 16]), (2, 3, 4, 4), {"save": [1, 16]}, {}),
    "steps": (lambda: Body(steps, **two(steps=16)), (2, 3, 4, 4), {"steps": 16}, {}),
    "spatial pad": (lambda: Body(spatial_pad, **two(border=16)), (2, 3, 4, 4), {"border": 16}, {}),
    "spatial split": (lambda: Body(spatial_split, **two(parts=[16, 48])), (2, 3, 8, 8), {"parts": [16, 48]}, {}),
    "channel split": (lambda: Body(channel_split, **two(parts=[6, 10])), (2, 3, 4, 4), {}, {"parts": 8}),
    "functional depthwise": (lambda: Body(depthwise, **two(k=nn.Conv2d(16, 16, 1, groups=16, bias=False), dim=16)),
                             (2, 3, 4, 4), {}, {"dim": 8}),
    "scale": (lambda: Body(scaled, **two(dim=16)), (2, 3, 4, 4), {"dim": 16}, {}),
    "positions": (lambda: Body(position, **two(n=16)), (2, 3, 4, 4), {"n": 16}, {}),
    "modulo": (lambda: Body(modulo, **two(i=16, n=16)), (2, 3, 4, 4), {"i": 16, "n": 16}, {}),
    "unflatten": (lambda: Body(unflattened, **two(heads=4, size=4)), (2, 3, 4, 4), {}, {}),
    "a size and a tuple": (lambda: Body(added_to_a_size, **two(heads=4, size=4)), (2, 3, 4, 4), {}, {"a.out_channels": 8}),
    "helper": (lambda: Body(by_helper, **two(block=Body(lambda m, x: x, o=16))), (2, 3, 4, 4), {}, {"block.o": 8}),
    "labels": (lambda: Body(both_sides, **two(num_labels=16)), (2, 3, 4, 4), {"num_labels": 16}, {}),
    "resize": (lambda: nn.Sequential(conv(3, 16), nn.Upsample(size=16), conv(16, 4)), (2, 3, 4, 4), {"1.size": 16}, {}),
    "last ones": (lambda: Body(negative, **two(last=4)), (2, 3, 4, 4), {}, {}),
    "padded channels": (lambda: Body(channel_pad, a=conv(3, 8), b=conv(16, 4), before=4, after=4), (2, 3, 4, 4), {}, {}),
    "expanded": (lambda: Body(expanded, **two(dim=16)), (2, 3, 4, 4), {}, {}),
    "pooled to as many": (lambda: nn.Sequential(conv(3, 16), nn.AdaptiveAvgPool2d(16), conv(16, 4)), (2, 3, 8, 8), {"1.output_size": 16}, {}),
}  # fmt: skip


def value(model: nn.Module, place: str) -> Any:
    module, _, key = place.rpartition(".")
    return getattr(model.get_submodule(module), key)


@pytest.mark.parametrize("name", CASES)
def test_attributes_change_only_where_they_were_read_as_widths(name: str) -> None:
    build, shape, stays, follows = CASES[name]
    shrunk = shrunk_and_judged(randomise(build()), example(*shape))
    assert {place: value(shrunk.model, place) for place in stays} == stays
    for place, new in follows.items():
        found = value(shrunk.model, place)
        assert (sum(found) if isinstance(found, list) else found) == new, place


def test_code_that_did_not_run_and_names_a_width_is_pointed_out(caplog) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.num_labels, self.inplanes = conv(3, 16), conv(16, 4), 16, 16

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return y if x.shape[-1] < 100 else y.view(-1, self.num_labels)

    with caplog.at_level(logging.WARNING, "prune_cli.structure"):
        small = shrunk_and_judged(randomise(Both()), example(2, 3, 4, 4)).model
    assert small.num_labels == small.inplanes == 16
    lines = [record.getMessage() for record in caplog.records]
    assert any("num_labels" in line for line in lines) and not any("inplanes" in line for line in lines)


def test_a_shortcut_padded_by_attributes_of_its_block_keeps_little() -> None:
    """Padding computed in the parent's forward from the block's widths: what is inside the branch shrinks all the same."""

    class Block(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.i, self.o, self.stride = i, o, 2
            self.conv1, self.bn1, self.conv2 = conv(i, o, 3, stride=2), nn.BatchNorm2d(o), conv(o, o, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.fc = conv(3, 8, 3), Block(8, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x, b = self.stem(x), self.block
            p = (b.o - b.i) // 2
            y = b.conv2(F.relu(b.bn1(b.conv1(x))))
            return self.fc(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, p, p))).mean((2, 3)))

    shrunk = shrunk_and_judged(randomise(Net()), example(2, 3, 8, 8))
    assert shrunk.model.block.conv1.out_channels == 8
