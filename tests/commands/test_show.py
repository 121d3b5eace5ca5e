"""`prune show`: what a recipe would do, with and without its data, short enough to be read."""

from __future__ import annotations

import re

import pytest
import yaml

from prune_cli.config.compose import compose


def test_a_summary_comes_first_and_alone(prune):
    result = prune("show", "recipe=quickstart", "--estimate")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("recipe   quickstart: LeNet-5") and len(lines) <= 20
    assert re.search(r"stage 1  train: 20 epochs of 21 steps of 64: 420 steps, 25,880 images, \d+:\d\d", result.out)
    for head in ("dataset", "model", "stage 3", "time", "disk", "memory", "next"):
        assert any(line.startswith(head) for line in lines), head
    assert "_target_" not in result.out


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        ("[prune]", "time     what the schedule of prune decides"),
        (
            "[prune,finetune]",
            r"time     about \d+:\d\d for [\d,]+ images on .*, and what the schedule of prune decides",
        ),
    ],
)
def test_a_time_that_the_schedule_decides_is_not_said_to_be_nothing(prune, stages, line):
    budget = ["granularity=filter", "granularity.budget={macs: 0.5}"]
    result = prune("show", "recipe=quickstart", "schedule=netadapt", f"stages={stages}", *budget, "--estimate")
    assert result.code == 0, result.err
    assert any(re.fullmatch(line, text) for text in result.out.splitlines()), result.out


def test_the_whole_config_comes_where_it_is_asked_for(prune):
    shown = prune("show", "recipe=quickstart", "--estimate", "--config").out
    head, _, text = shown.partition("\n\n")
    assert head.startswith("recipe ") and yaml.safe_load(text) == compose(["recipe=quickstart"]).config
    assert yaml.safe_load(prune("show", "recipe=quickstart", "--config").out.split("\nrecipe  ")[0])["regulariser"]


def test_only_what_runs_is_shown(prune):
    config = yaml.safe_load(prune("show", "recipe=quickstart", "stages=[train]").out.split("\nrecipe  ")[0])
    assert set(config) & {"train", "prune", "finetune", "criterion", "regulariser"} == {"train"}
    assert {"model", "dataset", "seed"} < set(config)


@pytest.mark.parametrize(
    ("arguments", "size", "steps"),
    [
        (("recipe=resnet20_cifar10_irre", "dataset.val=5000"), "45000 train, 5000 val, 10000 test", 352),
        (("recipe=resnet20_cifar10_irre", "dataset=cifar100", "dataset.val=0"), "50000 train, 10000 test", 391),
    ],
)
def test_without_the_data_it_goes_by_their_published_size(prune, arguments, size, steps):
    result = prune("show", *arguments, "--estimate")
    assert result.code == 0, result.err
    assert size in result.out and f"of {steps} steps of 128:" in result.out
    assert "note     the size is the published one, as the images are not here" in result.out
    assert len(result.out.splitlines()) <= 20


def test_made_up_data_that_are_asked_for_have_their_own_size(prune):
    result = prune("show", "recipe=resnet20_cifar10_irre", "dataset.fake=true", "--estimate")
    assert "512 train" in result.out and "note" not in result.out


def test_without_a_folder_of_ones_own_it_says_what_is_missing(prune):
    result = prune("show", "recipe=transfer_filter", "dataset.image_size=32")
    assert result.code == 0, result.err
    assert "note     made-up ones stand in for what is not here: image_folder needs dataset.root=FOLDER" in result.out


@pytest.mark.parametrize("word", ["--estimat", "-m", "--dry-run"])
def test_flags_of_other_commands_are_refused(prune, word):
    result = prune("show", "recipe=quickstart", word)
    assert result.code == 2 and "there is no option" in result.err and len(result.err.splitlines()) == 1
