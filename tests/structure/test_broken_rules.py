"""A bug in an operator's rule: an error where asked for, else one warning and channels that are kept."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.structure import propagate
from prune_cli.structure.follow import analyse
from prune_cli.structure.interpreter import BrokenRule
from prune_cli.structure.operators.call import Unsupported
from prune_cli.structure.operators.table import rule


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))


IMAGE = torch.zeros(1, 3, 9, 9)


def widths(plan) -> dict[str, int]:
    return {family.name: len(family.units) for family in plan.families}


@pytest.fixture
def breaks(monkeypatch):
    """Makes the rule of the sigmoid fail."""
    propagate._warn_once.cache_clear()

    def call(error: Exception) -> None:
        def broken(call):
            raise error

        monkeypatch.setattr(propagate, "rule", lambda name, func: broken if name == "sigmoid" else rule(name, func))

    return call


ERRORS = [
    IndexError("tuple index out of range"),
    TypeError("no"),
    ValueError("no"),
    AssertionError(),
    ZeroDivisionError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_broken_rule_raises_where_it_is_asked_for(breaks, error):
    breaks(error)
    with pytest.raises(BrokenRule, match=r"the rule of aten.sigmoid.default in 1 failed") as raised:
        analyse(network(), IMAGE)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_broken_rule_keeps_its_channels_and_says_so_once(breaks, monkeypatch, caplog, error):
    monkeypatch.delenv("PRUNE_STRICT_RULES")
    breaks(error)
    with caplog.at_level(logging.DEBUG, "prune_cli.structure.propagate"):
        for _ in range(3):
            plan = analyse(network(), IMAGE)
    assert widths(plan) == {"2": 4}
    assert any("aten.sigmoid.default in 1 is unknown" in warning for warning in plan.warnings)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "aten.sigmoid.default in 1" in warned[0] and type(error).__name__ in warned[0]
    traced = [record for record in caplog.records if record.levelno == logging.DEBUG and record.exc_info]
    assert traced and traced[0].exc_info[1] is error


def test_a_rule_that_does_not_know_is_no_bug(breaks, caplog):
    breaks(Unsupported())
    with caplog.at_level(logging.DEBUG, "prune_cli.structure.propagate"):
        assert widths(analyse(network(), IMAGE)) == {"2": 4}
    assert not [record for record in caplog.records if record.name == "prune_cli.structure.propagate"]


def test_a_training_mode_run_that_fails_leaves_nothing_behind():
    class Auxiliary(nn.Module):
        """Its auxiliary head ties two layers that have nothing to do with each other, and then fails."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(12, 5, 3)
            self.head = nn.Conv2d(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x), self.second(x)
            if self.training:
                self.head(a + b)
                raise RuntimeError("no targets")
            return self.last(torch.cat([a, b], 1))

    torch.manual_seed(0)
    assert widths(analyse(Auxiliary(), IMAGE)) == {"first": 6, "second": 6}


def test_a_network_that_does_not_run_is_still_an_error_of_the_user():
    with pytest.raises(SurgeryError, match="does not run on the example input"):
        analyse(network(), torch.zeros(1, 4, 9, 9))
