"""`limit_batches=1` tries a recipe: one epoch of a few images, but for what the command line says."""

from __future__ import annotations

import re

import pytest

from prune_cli.config.compose import compose
from prune_cli.config.locations import options


@pytest.mark.parametrize("recipe", options("recipe"))
def test_every_recipe_becomes_one_epoch_of_a_few_images(recipe, workplace):
    config = compose([f"recipe={recipe}", "limit_batches=1"]).config
    assert config["latency"] is False
    for stage in config["stages"]:
        node = config[stage]
        assert node.get("epochs", 0) <= 1 and node.get("batch_size", 1) <= 4 and node.get("images", 1) <= 16
        assert node.get("calibration", {}).get("images", 1) <= 16
        lengths = [value for key, value in node.get("schedule", {}).items() if re.search("epoch|iterations", key)]
        assert all(value <= 3 for value in lengths), node["schedule"]  # a mask, what comes before, what comes after


def test_what_the_command_line_says_stays(workplace):
    config = compose(
        ["recipe=lenet_digits_irre", "limit_batches=1", "train.epochs=7", "prune.batch_size=64", "schedule.epochs=40", "latency=true"]
    ).config  # fmt: skip
    assert config["train"]["epochs"] == 7 and config["train"]["batch_size"] == 4
    assert config["prune"]["batch_size"] == 64 and config["latency"] is True
    assert config["prune"]["schedule"]["epochs"] == 40 and config["prune"]["schedule"]["retrain_epoch"] == 15


def test_other_limits_cut_batches_alone(workplace):
    config = compose(["recipe=quickstart", "limit_batches=2"]).config
    assert config["train"]["epochs"] == 20 and config["latency"] is True
