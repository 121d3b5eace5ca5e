"""Another network goes on, taught by the one that came: what is left of that, rows, the store, and what is refused."""

from __future__ import annotations

import sys

import pytest

from prune_cli.files.checkpoint import read_checkpoint

SHORT = (
    "run", "recipe=quickstart", "limit_batches=2", "train.epochs=1", "finetune.epochs=1", "latency=false", "device=cpu",
)  # fmt: skip
PAIR = (*SHORT, "stages=[train,student,finetune]", "model@student.network=lenet_300_100")


def test_the_student_learns_from_the_network_that_came(prune):
    result = prune(*PAIR, "distillation=hinton", "finetune.epochs=3")
    assert result.code == 0, result.err
    rows = result.rows
    assert rows.model.tolist() == ["lenet5", "lenet_300_100", "lenet_300_100"]
    assert rows.loc["student", "params"] == 64 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    assert (rows.loc[["student", "finetune"], "acc1_dense"] == rows.loc["train", "acc1"]).all()
    assert rows.loc["finetune", "compression"] == pytest.approx(
        rows.loc["train", "params"] / rows.loc["finetune", "params"]
    )
    assert read_checkpoint(result.folder / "finetune").model["_target_"].endswith("lenet_300_100")
    again = prune(*PAIR, "distillation=hinton", "finetune.epochs=3")
    assert again.err.count("taken from the store") == 3
    assert again.rows.drop(columns=["seconds"]).equals(rows.drop(columns=["seconds"]))
    alone = prune(*PAIR, "finetune.epochs=3")
    assert alone.err.count("taken from the store") == 2, "the teacher is trained once"
    assert alone.rows.loc["finetune", "loss"] != rows.loc["finetune", "loss"]


def test_features_of_two_networks_are_paired_by_name(prune):
    pair = (
        *SHORT,
        "stages=[train,student,finetune]",
        "model=resnet20",
        "model.depth=8",
        "model@student.network=lenet5",
    )
    maps = ("distillation=similarity", "distillation.features={conv1: layer2}")
    assert prune(*pair, *maps).code == 0
    refused = prune(*pair, "distillation=similarity", "distillation.features={conv1: conv2}")
    assert refused.code == 2 and "the teacher has no module 'conv2'" in refused.err
    assert "starting" not in refused.err


def test_masks_and_snapshots_of_the_network_that_came_are_left_behind(prune):
    result = prune(
        *SHORT, "stages=[train,prune,student,finetune]", "train.remember=[0]", "granularity=filter",
        "model@student.network=lenet5", "student.network.widths=[5,6,7]", "distillation=hinton",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert not (result.folder / "student" / "pruned.yaml").exists()
    assert result.rows.loc["finetune", "sparsity"] == 0
    assert result.rows.loc["finetune", "params"] < result.rows.loc["prune", "params"]


OWN = "from torch import nn\n\n\ndef small(*, num_classes, in_shape):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"


def test_a_student_and_a_teacher_of_the_users_own_code_come_back_from_the_store(prune, workplace):
    (workplace / "own_networks.py").write_text(OWN)
    folder = workplace / "recipes" / "model"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text("# one layer\n_target_: own_networks.small\n")
    sys.path.insert(0, str(workplace))
    for networks in (("model@student.network=small",), ("model=small", "model@student.network=lenet5")):
        keys = (*SHORT, "stages=[train,student,finetune]", *networks, "distillation=hinton")
        assert prune(*keys).code == 0
        again = prune(*keys, "finetune.epochs=2")
        assert again.code == 0, again.err
        assert again.err.count("taken from the store") == 2
    sys.modules.pop("own_networks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("student.network=3",), "student.network"),
        (("student.network=null",), "student.network"),
        (("student.network.widths=[3]",), "widths"),
        (("student.network.wdths=[3]",), "wdths: unknown key"),
        (("student.network.weights=nowhere.pt",), "nowhere.pt"),
    ],
)
def test_a_network_that_cannot_be_is_refused_before_training(prune, arguments, message):
    result = prune(*PAIR, *arguments)
    assert result.code in (2, 4) and message in result.err, result.err
    assert "starting" not in result.err and len(result.err.strip().splitlines()) == 1


def test_the_shipped_default_is_a_network(prune):
    result = prune("show", *PAIR[1:5], "stages=[train,student,finetune]", "latency=false", "device=cpu")
    assert result.code == 0, result.err
    assert "resnet_cifar" in result.out
