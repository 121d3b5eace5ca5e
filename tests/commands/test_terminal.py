"""What a terminal shows before anything is loaded."""

from __future__ import annotations

import sys

import pytest

from prune_cli import cli


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "recipe=quickstart"], True),
        (["evaluate", "somewhere"], True),
        (["list", "--legal"], True),
        (["list"], False),
        (["run", "--help"], False),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_what_takes_long(monkeypatch, capsys, words, said, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delitem(sys.modules, "torch")
    cli._announce(words)
    assert (capsys.readouterr().err == "loading torch ...\n") is (said and terminal)
