"""Schedules that search and go back, from the command line: what they leave reloads, resumes, and is shared by ranks."""

from __future__ import annotations

import json
import re
import signal

import pandas
import pytest
import torch

from prune_cli import load_pruned
from prune_cli.files.weights import read_state_dict
from tests.runs.test_faults import folder_of, sums
from tests.runs.test_processes import torchrun

NET = (
    "run", "recipe=quickstart", "model=resnet20", "model.depth=8", "model.widths=[4,8,8]", "threads=1", "device=cpu",
    "latency=false", "deterministic=true", "train.epochs=1", "prune.batch_size=64", "criterion=l2", "limit_batches=3",
    "prune.optimizer.lr=0.05", "stages=[train,prune]",
)  # fmt: skip
NETADAPT = (
    *NET, "granularity=filter", "granularity.budget={macs: 0.5}", "schedule._target_=tests.session.searching.netadapt",
    "+schedule.step=0.1", "prune.fit.checkpoint_seconds=0",
)  # fmt: skip
LOTTERY = (
    *NET, "granularity=element", "granularity.ratio=0.6", "schedule._target_=tests.session.searching.lottery",
)  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("shrink_every", [0, 2])
def test_what_a_search_leaves_reloads_in_another_process(prune, shrink_every):
    result = prune(*NETADAPT, f"+schedule.shrink_every={shrink_every}")
    assert result.code == 0, result.err
    row = result.rows.loc["prune"]
    assert row.macs <= 0.5 * result.rows.loc["train", "macs"]
    assert row.macs > 0.4 * result.rows.loc["train", "macs"]
    folder = result.folder / "prune"
    small = load_pruned(folder)
    weights = read_state_dict(folder / "weights.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in small.state_dict().items())
    again = prune("evaluate", str(folder))
    assert again.code == 0, again.err
    assert f"{row.acc1:.2f}" in again.out


def test_a_search_leaves_its_tables_in_the_run_folder_and_any_row_can_be_made(prune):
    filters = (*NET, "granularity=filter", "granularity.budget={macs: 0.5}")
    result = prune(*filters, "schedule=optuna", "schedule.candidates=6", "schedule.objectives=[score,cost]")
    assert result.code == 0, result.err
    folder = result.folder / "prune"
    rows = pandas.read_csv(folder / "search.csv")
    assert len(rows) == 6 and {"search.csv", "front.csv", "search.svg"} <= {file.name for file in folder.iterdir()}
    assert {"search.csv", "front.csv"} <= set(json.loads((folder / "manifest.json").read_text())["files"])
    row = rows.loc[rows.macs.idxmin()]
    made = prune(
        *filters, "schedule=chosen", f"schedule.search={folder}/search.csv", f"schedule.candidate={row.candidate}"
    )
    assert made.code == 0, made.err
    assert made.rows.loc["prune", "macs"] == row.macs and made.rows.loc["prune", "params"] == row.params
    again = prune(*filters, "schedule=optuna", "schedule.candidates=6", "schedule.objectives=[score,cost]")
    assert (again.folder / "prune" / "search.csv").read_bytes() == (folder / "search.csv").read_bytes()


@pytest.mark.slow
def test_killed_in_a_search_that_shrinks_the_same_command_goes_on(prune, spawn, workplace):
    arguments = (*NETADAPT, "+schedule.shrink_every=1")
    calm = prune(*arguments)
    assert calm.code == 0, calm.err
    store = str(workplace / "other")
    fault = "prune 40 SIGKILL"  # three steps for each candidate, some three candidates a round
    assert spawn(*arguments, PRUNE_STORE=store, FAULT=fault).wait(timeout=300) == -signal.SIGKILL
    again = spawn(*arguments, PRUNE_STORE=store)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "begins again" not in err
    assert sums(folder_of(out)) == sums(calm.folder)


@pytest.mark.slow
def test_ranks_share_the_candidates_and_adopt_the_same(tmp_path):
    process = torchrun(tmp_path, *NETADAPT, "+schedule.shrink_every=2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    folder = tmp_path / out.strip().splitlines()[-1]
    rows = pandas.read_csv(folder / "results.csv").set_index("stage")
    assert rows.macs["prune"] <= 0.5 * rows.macs["train"]


def test_a_train_stage_remembers_and_a_later_schedule_goes_back(prune, workplace):
    remember = ("train.epochs=3", "train.remember=[0,2st,1ep,4st]")
    result = prune(*LOTTERY, *remember, "+schedule.rewind_to=1ep", "+schedule.rounds=1")
    assert result.code == 0, result.err
    folder = result.folder / "train"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {f"remembered_{tag}.safetensors" for tag in ("0", "2st", "1ep", "4st")} <= set(files)
    one = prune(*NET, "stages=[train]", "train.epochs=1", "lr_schedule@train.lr_schedule=constant")
    three = prune(
        *NET, "stages=[train]", "train.epochs=3", "lr_schedule@train.lr_schedule=constant", "train.remember=[1ep,3ep]"
    )
    kept = read_state_dict(three.folder / "train" / "remembered_1ep.safetensors")
    assert kept.pop("clock").tolist() == [1, 0, 3]
    weights = read_state_dict(one.folder / "train" / "weights.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in weights.items())
    last = read_state_dict(three.folder / "train" / "remembered_3ep.safetensors")
    weights = read_state_dict(three.folder / "train" / "weights.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in weights.items())
    refused = prune(*LOTTERY, *remember, "+schedule.rewind_to=9ep")
    assert refused.code == 8, refused.err
    assert "nothing is remembered as '9ep'" in refused.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("tags", "word"), [("[half]", "'half'"), ("[99ep]", "after the end"), ("[5000st]", "after the end")]
)
def test_moments_that_never_come_are_refused_before_training(prune, tags, word):
    result = prune(*NET, f"train.remember={tags}")
    assert result.code == 2, result.err
    assert word in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_snapshots_of_a_training_that_was_killed_are_those_of_one_that_was_not(prune, spawn, workplace):
    arguments = (
        *NET,
        "stages=[train]",
        "train.epochs=4",
        "train.remember=[0,5st,3ep]",
        "train.fit.checkpoint_seconds=0",
    )
    calm = prune(*arguments)
    wanted = json.loads((calm.folder / "train" / "manifest.json").read_text())["files"]
    store = str(workplace / "other")
    assert spawn(*arguments, PRUNE_STORE=store, FAULT="train 8 SIGKILL").wait(timeout=300) == -signal.SIGKILL
    again = spawn(*arguments, PRUNE_STORE=store)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "going on from epoch" in err
    found = json.loads((folder_of(out) / "train" / "manifest.json").read_text())["files"]
    assert {name: value for name, value in found.items() if "remembered" in name} == {
        name: value for name, value in wanted.items() if "remembered" in name
    }


@pytest.mark.parametrize(("schedule", "epochs"), [("one_shot", 0), ("iterative", 100), ("admm", 30)])
def test_show_says_how_long_a_schedule_trains_at_most(prune, schedule, epochs):
    result = prune("show", *NET[1:], f"schedule={schedule}", "granularity=element", "--estimate")
    assert result.code == 0, result.err
    found = re.search(r"stage \d+  prune: (\d+) epochs of", result.out)
    assert (int(found[1]) if found else 0) == epochs


def test_show_runs_no_search(prune):
    result = prune("show", *NETADAPT[1:], "--estimate")
    assert result.code == 0, result.err
    assert "prune: trains as long as its schedule decides" in result.out
