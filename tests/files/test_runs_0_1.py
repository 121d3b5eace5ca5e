"""Run folders that version 0.1.0 wrote are read as it read them: the same accuracy, the same logits."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from prune_cli import load_pruned
from prune_cli.config.nodes import resolve

OLD = Path(__file__).parent / "runs_0_1"
LOGITS = json.loads((OLD / "logits.json").read_text())
STAGES = sorted(path.parent.relative_to(OLD).as_posix() for path in OLD.glob("*/*/checkpoint.json"))


@pytest.fixture
def old(workplace) -> Path:
    """A copy of the folders, in which commands may write."""
    return Path(shutil.copytree(OLD, workplace / "old"))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """The first eight test images, by the config of an old run."""
    config = yaml.safe_load((OLD / "filter" / "config.yaml").read_text())
    return next(iter(resolve(config["dataset"], "dataset").evaluation("test", 8)))[0]


def rows(run: str) -> dict[str, dict[str, str]]:
    with (OLD / run / "results.csv").open(newline="") as file:
        return {row["stage"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("place", LOGITS)
def test_load_pruned_gives_the_logits_of_then(place, images):
    with torch.no_grad():
        found = load_pruned(OLD / place).eval()(images)
    assert torch.allclose(found, torch.tensor(LOGITS[place]), atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_evaluate_says_what_the_table_says(prune, old, stage):
    run, name = stage.split("/")
    result = prune("evaluate", str(old / stage))
    assert result.code == 0, result.err
    row = rows(run)[name]
    assert f"acc1 {float(row['acc1']):.2f}," in result.out
    assert f"({row['params']})" in result.out and f"({row['macs']})" in result.out


@pytest.mark.parametrize("run", ["filter", "stripe", "element"])
def test_a_run_folder_stands_for_its_last_stage(prune, old, run):
    result = prune("evaluate", str(old / run))
    assert result.code == 0, result.err
    last = list(rows(run).values())[-1]
    assert f"acc1 {float(last['acc1']):.2f}," in result.out


def test_the_compressed_file_is_evaluated_alone(prune, old):
    result = prune("evaluate", str(old / "element" / "share" / "weights.compressed"))
    assert result.code == 0, result.err
    assert f"acc1 {float(rows('element')['share']['acc1']):.2f}," in result.out


@pytest.mark.parametrize("run", ["filter", "stripe"])
def test_an_old_run_is_exported(prune, old, images, run):
    result = prune("export", str(old / run), "--program", "net.pt2")
    assert result.code == 0, result.err
    found = torch.export.load("net.pt2").module()(images)
    assert torch.allclose(found, torch.tensor(LOGITS[f"{run}/finetune"]), atol=1e-4)


@pytest.mark.parametrize("stage", ["filter/finetune", "stripe/finetune", "filter/train"])
def test_an_old_network_teaches(prune, old, stage):
    result = prune(
        "run", "recipe=quickstart", "model.widths=[4,8,24]", "limit_batches=1", "latency=false", "device=cpu",
        "train.epochs=1", "finetune.epochs=1", "distillation=hinton", f"distillation.teacher=old/{stage}",
    )  # fmt: skip
    assert result.code == 0, result.err
