"""Every shipped recipe and every shipped option runs: a new file is tested by existing."""

from __future__ import annotations

import re

import pytest

from prune_cli.config.locations import options

TINY = ("limit_batches=1", "dataset.fake=true", "latency=false", "device=cpu")


@pytest.fixture
def short(prune, monkeypatch):
    """Runs a recipe for one small batch per epoch, one epoch per stage, on a few small images."""
    from prune_cli.config.compose import compose
    from prune_cli.data.fake import stand_in

    monkeypatch.setitem(stand_in.__kwdefaults__, "sizes", (64, 32))

    def call(*arguments: str):
        config = compose(list(arguments)).config
        cut = [f"{stage}.epochs=1" for stage in set(config["stages"]) if "epochs" in config[stage]]
        cut += [f"{stage}.batch_size=4" for stage in set(config["stages"]) if "batch_size" in config[stage]]
        cut += [f"{stage}.calibration.images=6" for stage in set(config["stages"]) if "calibration" in config[stage]]
        if "skeleton" in config["stages"]:  # stripes begin at 1 and have one step to die
            cut += ["skeleton.threshold=0.9999"]
        large = "resize" in config["dataset"]
        if large:
            cut += ["dataset.image_size=64", "dataset.resize=64"]
        if "retrain_epoch" in config["schedule"]:
            soft = 0 if large else 1  # a mask update of VGG-16 with its classifier takes many seconds
            cut += [f"schedule.epochs={soft + 1}", f"schedule.retrain_epoch={soft}", "schedule.prune_freq=1"]
        if "iterations" in config["schedule"]:
            cut += ["schedule.iterations=2", "schedule.epochs_per_iteration=1", "schedule.retrain_epochs=0"]
        return prune("run", *arguments, *cut, *TINY)

    return call


@pytest.mark.parametrize("name", options("recipe"))
def test_recipe_runs(short, name):
    result = short(f"recipe={name}")
    assert result.code == 0, result.err
    rows = result.rows
    assert rows.acc1.between(0, 100).all()
    assert (rows.params_nonzero.iloc[-1] < rows.params_nonzero.iloc[0]) or rows.params.iloc[-1] < rows.params.iloc[0]


@pytest.mark.parametrize(("name", "path"), options("recipe").items())
def test_recipe_header_says_what_it_reproduces(name, path):
    text = path.read_text()
    assert text.startswith("# @package _global_\n")
    assert re.search(r"^# reproduces: .{10,}", text, re.M)
    assert re.search(r"^# published: (none known|.*\d.*)", text, re.M)
    assert re.search(rf"^# command: prune run recipe={name}", text, re.M)


@pytest.mark.parametrize("name", options("dataset"))
def test_every_dataset_trains_a_network_without_its_files(short, name):
    result = short("recipe=quickstart", f"dataset={name}", "stages=[train]")
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer(short, name):
    result = short("recipe=quickstart", f"optimizer@finetune.optimizer={name}", "finetune.optimizer.lr=1e-3")
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", options("lr_schedule"))
def test_every_lr_schedule(short, name):
    result = short("recipe=quickstart", f"lr_schedule@train.lr_schedule={name}")
    assert result.code == 0, result.err


@pytest.mark.parametrize("criterion", options("criterion"))
@pytest.mark.parametrize("granularity", options("granularity"))
@pytest.mark.parametrize("schedule", options("schedule"))
def test_every_legal_combination_runs_and_every_other_is_refused(short, criterion, granularity, schedule):
    result = short(
        "recipe=quickstart", "dataset=fake", "model=resnet20", "stages=[prune]", "granularity.ratio=0.5",
        f"criterion={criterion}", f"granularity={granularity}", f"schedule={schedule}",
    )  # fmt: skip
    if result.code == 0:
        assert result.rows.loc["prune", "ratio_prunable"] == pytest.approx(0.5, abs=0.03)
    else:
        assert result.code == 2
        assert "choose" in result.err or "needs" in result.err


@pytest.mark.parametrize("name", options("distillation"))
def test_every_distillation(short, name):
    result = short("recipe=quickstart", f"distillation={name}")
    assert result.code == 0, result.err
