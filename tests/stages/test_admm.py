"""The schedule admm from the command line: every granularity, the table of residuals, stops, several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pandas
import pytest
import torch

from prune_cli.config.locations import options
from prune_cli.files.weights import read_state_dict
from tests.runs.test_faults import folder_of, sums
from tests.runs.test_processes import torchrun

NET = (
    "run", "recipe=quickstart", "model=resnet20", "model.depth=8", "model.widths=[4,8,8]", "threads=1", "device=cpu",
    "latency=false", "deterministic=true", "train.epochs=1", "prune.batch_size=64", "schedule=admm", "criterion=l2",
    "prune.optimizer.lr=0.05",
)  # fmt: skip
SHORT = ("schedule.iterations=2", "schedule.epochs_per_iteration=1", "stages=[train,prune]", "limit_batches=4")
RATIOS = {"n_m": "0.75", "pattern": "0.75"}


def residuals(folder):
    return pandas.read_csv(folder / "prune" / "admm.csv")


@pytest.mark.parametrize("granularity", options("granularity"))
def test_every_granularity_converges_to_masks_that_hold_exactly(prune, granularity):
    ratio = RATIOS.get(granularity, "0.5")
    keys = ["granularity.shrink=false"] if granularity in ("filter", "stripe") else []
    result = prune(*NET, *SHORT, f"granularity={granularity}", f"granularity.ratio={ratio}", *keys)
    assert result.code == 0, result.err
    weights = read_state_dict(result.folder / "prune" / "weights.safetensors")
    masks = read_state_dict(result.folder / "prune" / "masks.safetensors")
    assert masks
    for name, mask in masks.items():
        assert not (weights[name] * ~mask.bool()).any(), name
    assert result.rows.loc["prune", "ratio_prunable"] == pytest.approx(float(ratio), abs=0.05)
    table = residuals(result.folder)
    assert set(table.constraint) == ({"pattern", "connectivity"} if granularity == "pattern" else {"units"})
    assert set(table.iteration) == {0, 1, 2}
    assert table[table.iteration == 0].dual.isna().all()
    assert table[table.iteration > 0].dual.notna().all()
    assert table.primal.between(0, 10).all()


def test_filters_are_shrunk_at_the_end(prune):
    result = prune(*NET, *SHORT, "granularity=filter", "granularity.shrink=true", "schedule.retrain_epochs=1")
    assert result.code == 0, result.err
    assert result.rows.loc["prune", "params"] < 0.6 * result.rows.loc["train", "params"]
    assert result.rows.loc["prune", "epochs"] == 3


@pytest.mark.thorough
def test_the_penalty_draws_the_weights_into_the_set(prune):
    """With a strong one little is lost when the masks come; without training towards them much is."""
    keys = (
        "stages=[train,prune]", "granularity=pattern", "granularity.ratio=0.75", "train.epochs=6",
        "lr_schedule@prune.lr_schedule=constant", "prune.optimizer.lr=0.02",
    )  # fmt: skip
    trained = prune(
        *NET, *keys, "schedule.iterations=8", "schedule.epochs_per_iteration=1", "schedule.rho=0.02",
        "schedule.rho_growth=2", "schedule.rho_max=1",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    table = residuals(trained.folder)
    for _, part in table[table.parameter == "all"].groupby("constraint"):
        assert part.primal.iloc[-1] < 0.25 * part.primal.iloc[0]
    at_once = prune(*(key for key in NET if key != "schedule=admm"), *keys, "schedule=one_shot")
    assert trained.rows.acc1["prune"] > at_once.rows.acc1["prune"] + 10


def test_ratio_zero_trains_like_plain_training(prune):
    without = prune(*NET, *SHORT, "granularity.ratio=0", "schedule.rho=100", "schedule.rho_max=null")
    assert without.code == 0, without.err
    other = prune(*NET, *SHORT, "granularity.ratio=0", "schedule.rho=0.001")
    first, second = (read_state_dict(r.folder / "prune" / "weights.safetensors") for r in (without, other))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not (without.folder / "prune" / "admm.csv").exists()


@pytest.mark.parametrize("criterion", ["taylor", "wanda", "fpgm", "bn_scale"])
def test_criteria_that_need_more_than_weights(prune, criterion):
    granularity = "filter" if criterion in ("fpgm", "bn_scale") else "stripe"
    result = prune(*NET, *SHORT, f"criterion={criterion}", f"granularity={granularity}")
    assert result.code == 0, result.err


def test_a_budget_and_a_global_ranking(prune):
    for keys in (["granularity.budget={params: 0.4}"], ["granularity.scope=global", "granularity.ratio=0.6"]):
        result = prune(*NET, *SHORT, "granularity=stripe", *keys)
        assert result.code == 0, result.err
    assert result.rows.loc["prune", "ratio_prunable"] == pytest.approx(0.6, abs=0.01)


def test_what_an_earlier_stage_removed_stays_removed(prune):
    result = prune(*NET, *SHORT, "stages=[train,prune,prune]", "granularity=element")
    assert result.code == 0, result.err
    folders = sorted(path.name for path in result.folder.iterdir() if path.is_dir() and path.name.startswith("prune"))
    first, second = (read_state_dict(result.folder / name / "masks.safetensors") for name in folders)
    assert all(not (second[name].bool() & ~mask.bool()).any() for name, mask in first.items())


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("schedule.rho=0", "rho=0"),
        ("schedule.rho=-1", "rho=-1"),
        ("schedule.iterations=0", "iterations"),
        ("schedule.epochs_per_iteration=0", "epochs_per_iteration"),
        ("schedule.rho_growth=0.1", "rho_growth"),
        ("schedule.rho_max=1e-9", "rho_max"),
        ("schedule.rho=much", "rho"),
        ("prune.fit.select_on=test", "select_on"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_training(prune, key, word):
    result = prune(*NET, key)
    assert result.code == 2, result.err
    assert len(result.err.strip().splitlines()) == 1
    assert word in result.err


LONG = (
    *NET, "stages=[train,prune]", "granularity=pattern", "granularity.ratio=0.75", "schedule.iterations=5",
    "schedule.epochs_per_iteration=2", "schedule.rho_growth=2", "schedule.retrain_epochs=2",
    "prune.fit.checkpoint_seconds=0",
)  # fmt: skip


@pytest.mark.slow
def test_kill_nine_then_the_same_command_ends_with_the_same_bytes(prune, spawn, workplace):
    calm = prune(*LONG)
    assert calm.code == 0, calm.err
    wanted, table = sums(calm.folder), (calm.folder / "prune" / "admm.csv").read_bytes()
    fault = "prune 70 SIGKILL"  # in the second iteration of the second projection's four epochs
    assert spawn(*LONG, PRUNE_STORE=str(workplace / "other"), FAULT=fault).wait(timeout=300) == -signal.SIGKILL
    again = spawn(*LONG, PRUNE_STORE=str(workplace / "other"))
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "going on from epoch" in err
    assert "iteration 0" not in err
    assert sums(folder_of(out)) == wanted
    assert (folder_of(out) / "prune" / "admm.csv").read_bytes() == table


@pytest.mark.slow
def test_two_processes_agree_on_every_projection(tmp_path):
    process = torchrun(tmp_path, *NET, *SHORT, "granularity=pattern", "granularity.ratio=0.75")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    folder = tmp_path / out.strip().splitlines()[-1]
    assert (folder / "prune" / "admm.csv").exists()
    alone = subprocess.run(
        [sys.executable, "-m", "prune_cli", *NET, *SHORT, "granularity=pattern", "granularity.ratio=0.75"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(__file__).rpartition("/tests/")[0]},
        capture_output=True, text=True,
    )  # fmt: skip
    assert alone.stderr.count("taken from the store") == 2, alone.stderr
