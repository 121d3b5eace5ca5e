"""Scalars: what TensorBoard shows of a run is what its history has, of stages from the store too."""

from __future__ import annotations

import sys

import pandas
import pytest

from prune_cli.console import Console

QUICK = (
    "run", "recipe=quickstart", "limit_batches=2", "train.epochs=2", "finetune.epochs=3", "latency=false", "threads=1",
    "tensorboard=true",
)  # fmt: skip


def test_scalars_are_the_history_also_of_stages_from_the_store(prune):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for stored in (0, 3):
        run = prune(*QUICK)
        assert run.code == 0, run.err
        assert run.err.count("taken from the store") == stored
        history = pandas.read_csv(run.folder / "history.csv")
        events = accumulator.EventAccumulator(str(run.folder / "tensorboard"))
        events.Reload()
        shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert {tag.split("/")[0] for tag in shown} == {"train", "finetune"}
        for (stage, name), found in ((tag.split("/"), found) for tag, found in shown.items()):
            rows = history[history.stage == stage]
            assert [step for step, _ in found] == rows.epoch.tolist()
            assert [value for _, value in found] == pytest.approx(rows[name].tolist(), rel=1e-6)


def test_a_missing_extra_is_told_before_anything_is_trained(prune, workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = prune(*QUICK)
    assert result.code == 2
    assert "prune-cli[tensorboard]" in result.err
    assert not list(workplace.glob("outputs/store/*"))


def test_an_epoch_is_told_once_while_the_stage_runs():
    told = []
    console = Console(scalar=lambda *figures: told.append(figures))
    rows = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "acc1": 50.0}]
    console.history("train", rows[:1])
    assert told == [("train/loss", 2.0, 1)]
    console.history("train", rows)
    console.history("train", rows)
    assert told[1:] == [("train/loss", 1.0, 2), ("train/acc1", 50.0, 2)]
