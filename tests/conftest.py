"""Shared fixtures: a working directory of one's own, and the command line in this process or another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas
import pytest
import torch

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)
os.environ["PRUNE_STRICT_RULES"] = "1"  # a bug in an operator's rule fails the test instead of pruning less


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, both streams."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The run folder that `prune run` prints last."""
        return Path(self.out.strip().splitlines()[-1])

    @property
    def rows(self) -> pandas.DataFrame:
        """results.csv of the run, by stage."""
        return pandas.read_csv(self.folder / "results.csv").set_index("stage")


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A fresh working directory with its own store, and one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNE_RECIPES", raising=False)
    monkeypatch.delenv("PRUNE_STORE", raising=False)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def prune(workplace, capfd) -> Callable[..., Result]:
    """Runs `prune ARGUMENTS` in this process, through the same entry point as the command."""
    from prune_cli.cli import dispatch

    def call(*arguments: str) -> Result:
        capfd.readouterr()
        try:
            code = dispatch(list(arguments))
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            torch.use_deterministic_algorithms(False)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def spawn(workplace) -> Callable[..., subprocess.Popen]:
    """Starts `prune ARGUMENTS` in a process of its own; FAULT hits it on the way (tests/faulty.py)."""
    started = []

    def call(*arguments: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faulty", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
