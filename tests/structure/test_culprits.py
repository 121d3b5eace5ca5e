"""Channels without which the small network is another function: found by trying parts out, kept, and said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prune_cli import report, shrink
from prune_cli.errors import SurgeryError
from prune_cli.structure.culprits import TooManyTries, culprits
from tests.structure.networks import example, randomise
from tests.structure.oracle import Body


@given(st.integers(1, 60), st.data())
def test_every_culprit_is_found_and_nobody_else(n: int, data: st.DataObject) -> None:
    guilty = data.draw(st.sets(st.integers(0, n - 1), max_size=5))
    asked: list[list[int]] = []

    def holds(part: Any) -> bool:
        asked.append(list(part))
        return guilty.isdisjoint(part)

    assert culprits(range(n), holds, 200) == sorted(guilty)
    assert len(asked) <= 1 + 2 * len(guilty) * n.bit_length()


def test_there_is_an_end_of_trying() -> None:
    with pytest.raises(TooManyTries):
        culprits(range(100), lambda part: False, 10)


def by_length(m: Any, x: Tensor) -> Tensor:
    """A longer batch than the example's runs other code, which nobody saw, in one place of three."""
    y = m.a(x)
    y = m.b((y.flip(1) if len(x) > 4 else y).relu())
    return m.d(m.c(y.relu()).relu())


def chain() -> nn.Module:
    layers = {"a": (6, 16), "b": (16, 12), "c": (12, 8), "d": (8, 3)}
    return randomise(Body(by_length, **{name: nn.Linear(*sizes) for name, sizes in layers.items()}))


def test_what_the_check_finds_on_other_inputs_keeps_its_own_channels_alone(caplog) -> None:
    small = shrink(chain(), example(4, 6))
    assert [small.get_submodule(name).out_features for name in "abcd"] == [16, 6, 4, 3]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("a: all channels stay, since without some of them the shrunk network differs")
    assert "a batch twice as large" in line and "granularity.shrink" not in line and line in report(small).notes
    assert report(small).predicted == report(small).realised and report(small).removed == 10


def test_where_nothing_else_could_go_it_is_an_error() -> None:
    with pytest.raises(SurgeryError, match="a batch twice as large"):
        shrink(chain(), example(4, 6), ratio={"a": 0.5})
