"""What stages declare: checked before training, for shipped stages and for a user's own functions."""

from __future__ import annotations

import sys

import pytest

NINE = (
    "recipe=quickstart", "model=torchvision", "model.name=resnet18", "dataset=fake", "dataset.train=9", "dataset.val=0",
    "dataset.shape=[3,32,32]", "latency=false", "device=cpu",
)  # fmt: skip


def refused(result, message: str) -> None:
    assert result.code == 2 and message in result.err, result.err
    assert "starting" not in result.err and len(result.err.strip().splitlines()) == 1, result.err


def test_a_schedule_that_trains_is_checked_for_a_last_batch_of_one_image(prune):
    keys = (*NINE, "stages=[prune]", "schedule=iterative", "schedule.epochs=2", "schedule.retrain_epoch=1")
    refused(prune("run", *keys, "prune.batch_size=8"), "prune.batch_size=8 leaves one image of 9 for the last batch")
    assert prune("run", *keys, "prune.batch_size=9", "schedule.epochs=1").code == 0


def test_a_schedule_that_does_not_train_takes_any_batch(prune):
    result = prune("show", *NINE, "stages=[prune]", "schedule=one_shot", "prune.batch_size=8")
    assert result.code == 0, result.err
    assert "prune: 20" not in result.out and "epochs of" not in result.out.split("stage 1")[1]


def test_show_says_how_long_a_schedule_trains(prune):
    keys = (
        "recipe=quickstart",
        "stages=[prune]",
        "schedule=iterative",
        "schedule.epochs=7",
        "schedule.retrain_epoch=3",
    )
    assert "prune: 7 epochs of 11 steps of 128: 77 steps" in prune("show", *keys, "--estimate").out
    keys = ("recipe=quickstart", "stages=[prune]", "granularity=pattern", "model=resnet20", "schedule=admm")
    assert "prune: 31 epochs of" in prune("show", *keys, "schedule.retrain_epochs=1").out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("prune.optimizer.lr=-1",), "prune.optimizer: Invalid learning rate"),
        (("prune.fit.early_stop=2", "dataset.val=0"), "prune.fit.early_stop needs a validation split"),
        (("prune.fit.select_on=val",), "select on a split in finetune"),
    ],
)
def test_a_schedule_that_trains_has_its_settings_checked(prune, keys, message):
    refused(prune("run", "recipe=quickstart", "stages=[prune]", "schedule=iterative", *keys), message)


def recipe(workplace, text: str) -> None:
    folder = workplace / "recipes/recipe"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n# one's own\n{text}")


MINE = """
defaults:
  - /stage@small: small
  - override /model: resnet20
  - override /granularity: n_m
threads: 1
latency: false
dataset: {channels: 3}
train: {epochs: 1}
"""
SMALL = """# takes filters out
_target_: prune_cli.stages.prune.prune
defaults:
  - /granularity@granularity: filter
  - /optimizer@optimizer: sgd
  - /lr_schedule@lr_schedule: constant
criterion: ${criterion}
schedule: ${schedule}
distillation: ${distillation}
batch_size: 64
fit: {}
calibration: {}
"""


def test_permute_after_a_stage_that_shrinks_is_refused_before_training(prune, workplace):
    (workplace / "recipes/stage").mkdir(parents=True)
    (workplace / "recipes/stage/small.yaml").write_text(SMALL)
    recipe(workplace, MINE)
    keys = ("run", "recipe=mine", "limit_batches=1")
    refused(prune(*keys, "stages=[train,small,permute,prune]"), "small makes the network smaller")
    result = prune(*keys, "stages=[train,small,permute]", "small.granularity.shrink=false")
    assert result.code == 0, result.err
    result = prune(*keys, "stages=[train,permute,small]")
    assert result.code == 0, result.err


def test_nothing_follows_shared_weights(prune):
    result = prune("run", "recipe=quickstart", "stages=[share,finetune]")
    refused(result, "finetune after share would lose the shared weights; put share after it")


OWN = """
from typing import Annotated
from prune_cli.config.nodes import Flat
from prune_cli.session import learning
from prune_cli.pipeline.stage import Stage, own_epochs
from prune_cli.training.training import Training

def plain(state, *, factor: float = 0.5):
    for parameter in state.model.parameters():
        parameter.data.mul_(factor)
    return state

def spelled(state, *, epochs: int, batch_size: int, optimizer, lr_schedule):
    training = Training(batch_size=batch_size, optimizer=optimizer, lr_schedule=lr_schedule, fit=learning.loop.DEFAULTS)
    return learning.trained(state, learning.cross_entropy(0.0), epochs=epochs, training=training)

def never_twice(state, *, epochs):
    if epochs > 1:
        from prune_cli.errors import ConfigError
        raise ConfigError(f"{state.stage}.epochs={epochs}: one is enough")

@Stage(check=never_twice, trains=own_epochs, final="would spoil it; put {stage} last")
def declared(state, *, epochs: int, training: Annotated[Training, Flat()]):
    return learning.trained(state, learning.cross_entropy(0.0), epochs=epochs, training=training)
"""
TRAINS = """epochs: 1
batch_size: 64
optimizer: {_target_: torch.optim.SGD, _partial_: true, lr: 0.01}
lr_schedule: {_target_: prune_cli.training.lr_schedules.constant, _partial_: true}
"""


@pytest.fixture
def own(workplace, prune):
    (workplace / "own_stages.py").write_text(OWN)
    folder = workplace / "recipes/stage"
    folder.mkdir(parents=True)
    (folder / "plain.yaml").write_text("# scales\n_target_: own_stages.plain\nfactor: 0.25\n")
    (folder / "spelled.yaml").write_text(f"# key by key\n_target_: own_stages.spelled\n{TRAINS}")
    (folder / "declared.yaml").write_text(f"# declared\n_target_: own_stages.declared\n{TRAINS}fit: {{}}\n")
    recipe(
        workplace,
        "defaults:\n  - /stage@plain: plain\n  - /stage@spelled: spelled\n  - /stage@declared: declared\n"
        "latency: false\nlimit_batches: 1\nthreads: 1\n",
    )
    yield lambda *keys: prune("run", "recipe=mine", *keys)
    sys.modules.pop("own_stages", None)


def test_a_stage_of_ones_own_needs_no_declaration(own):
    result = own("stages=[spelled,plain,prune,declared]")
    assert result.code == 0, result.err
    rows = result.rows
    assert rows.loc["spelled", "epochs"] == rows.loc["declared", "epochs"] == 1
    assert rows.loc["spelled", "acc1_dense"] != rows.loc["spelled", "acc1_dense"], "nothing was removed before"
    assert rows.loc["prune", "ratio_prunable"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("stages=[spelled]", "spelled.optimizer.lr=-1"), "spelled.optimizer: Invalid learning rate"),
        (("stages=[declared]", "declared.optimizer.lr=-1"), "declared.optimizer: Invalid learning rate"),
        (("stages=[declared]", "declared.epochs=2"), "declared.epochs=2: one is enough"),
        (("stages=[declared]", "+declared.fit.select_on=val", "dataset.val=0"), "declared.fit.select_on=val"),
        (("stages=[declared]", "+declared.bacth_size=3"), "declared.bacth_size: unknown key; did you mean 'batch_size'"),
        (("stages=[declared,plain]",), "plain after declared would spoil it; put declared last"),
        (
            ("stages=[spelled]", "model=torchvision", "model.name=resnet18", "dataset=fake", "dataset.train=9",
             "dataset.val=0", "spelled.batch_size=8", "limit_batches=null"),
            "spelled.batch_size=8 leaves one image",
        ),
    ],
)  # fmt: skip
def test_a_stage_of_ones_own_is_checked_by_what_it_takes(own, keys, message):
    refused(own(*keys), message)
