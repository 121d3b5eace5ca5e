"""Bars: what a terminal of 80 and of 120 columns shows, that short work shows nothing, and that nothing is left behind."""

from __future__ import annotations

import io
import logging
import re

import pytest
from rich.console import Console as RichConsole

from prune_cli import progress
from prune_cli.console import Console
from prune_cli.progress import fitting, shown, track


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of so many columns: its last drawn lines as plain text."""

    def make(width: int):
        file = io.StringIO()
        monkeypatch.setattr(
            progress, "stderr", RichConsole(file=file, force_terminal=True, width=width, color_system=None)
        )
        monkeypatch.setattr(progress, "_enabled", True)
        monkeypatch.setattr(progress, "REFRESH", 0.0)
        return lambda: [
            line
            for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", file.getvalue()))
            if line.strip()
        ]

    yield make
    assert progress._display is None and not progress._drawn, "the screen is free again"


def test_facts_are_left_out_from_the_end():
    assert fitting(["epoch 1/2", "0:10 left", "lr 0.1"], 20) == "epoch 1/2  0:10 left"
    assert fitting(["epoch 1/2", "0:10 left", "lr 0.1"], 19) == "epoch 1/2"
    assert fitting(["longer than the room"], 3) == "longer than the room"
    assert fitting([], 3) == ""


@pytest.mark.parametrize("width", [80, 120])
def test_a_training_says_stage_epoch_rate_and_time_left(terminal, width):
    lines = terminal(width)
    console = Console()
    console.stage(2, 3)
    with console.training("finetune", 0, 182, 391):
        console.history("finetune", [{"epoch": 1, "loss": 2.0, "acc1": 50.0}])
        for step in range(1, 4):
            console.tick(99, step, 128, 0.05, 0.0258)
    line = lines()[-1]
    assert len(line) <= width
    assert re.search(r"finetune, stage 2 of 3 +\S+ +epoch 100/182  [\d:]+ left  [\d,]+ images/s", line), line
    assert ("held out 50.00 %" in line and "lr 0.05" in line) == (width == 120)
    assert "…" not in line


def test_work_within_work_has_a_line_below(terminal):
    lines = terminal(80)
    with shown("outer", 3, delay=0) as outer:
        outer.update(1)
        with shown("inner", 2, delay=0) as inner:
            inner.update(1)
            assert any(line.startswith("outer") for line in lines()) and lines()[-1].startswith("inner")
        outer.update(2)
        assert lines()[-1].startswith("outer") and "2/3" in lines()[-1]


def test_short_work_is_not_shown(terminal):
    lines = terminal(80)
    assert list(track([1, 2], "short")) == [1, 2]
    assert not lines()


def test_elsewhere_a_line_comes_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_enabled", True)
    monkeypatch.setattr(progress, "QUIET", 0.0)
    with caplog.at_level(logging.INFO):
        assert list(track(range(2), "evaluating")) == [0, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "evaluating: 1/2  0:00 left",
        "evaluating: 2/2  0:00 left",
    ]


def test_programs_of_ones_own_see_nothing(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_enabled", False)
    monkeypatch.setattr(progress, "QUIET", 0.0)
    with caplog.at_level(logging.INFO):
        assert list(track(range(2), "evaluating")) == [0, 1]
    assert not caplog.records


def test_an_error_inside_clears_the_screen(terminal):
    terminal(80)
    with pytest.raises(ValueError), shown("outer", 3, delay=0):
        raise ValueError
