"""What is refused before anything is trained: networks, criteria and batches that do not fit."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.runs.test_cli import QUICK

OWN = """
import torch
from torch import nn
class Tied(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c.weight, self.f = self.b.weight, nn.Linear(8, num_classes)
    def forward(self, x):
        return self.f(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))
def broken(num_classes: int):
    raise RuntimeError("no such thing")
def sized():
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 10))
def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


@pytest.fixture
def own(workplace):
    (workplace / "own.py").write_text(OWN)
    (workplace / "recipes/model").mkdir(parents=True)
    for name in ("Tied", "broken", "sized", "few"):
        (workplace / f"recipes/model/{name}.yaml").write_text(f"# a network of one's own\n_target_: own.{name}\n")
    yield
    sys.modules.pop("own", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "own.broken raised RuntimeError: no such thing"),
        ("sized", "model=sized fails on images of (1, 8, 8): RuntimeError"),
        ("few", "must return (1, 10), a logit per class"),
    ],
)
def test_own_networks_that_do_not_fit_are_refused_before_training(prune, own, workplace, name, message):
    result = prune("run", *QUICK, f"model={name}")
    assert result.code == 2 and message in result.err and len(result.err.strip().splitlines()) == 1, result.err
    assert not list(workplace.glob("outputs/store/*"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no idea')", "scoring conv1.weight raised ValueError: no idea"),
        ("return view.weight.sum()", "have shape ()"),
        ("return 1.0", "are a float, not a tensor"),
    ],
)
def test_own_criteria_are_tried_before_training(prune, workplace, monkeypatch, body, message):
    (workplace / "scores.py").write_text(f"def mine(view):\n    {body}\n")
    monkeypatch.delitem(sys.modules, "scores", raising=False)
    (workplace / "recipes/criterion").mkdir(parents=True)
    (workplace / "recipes/criterion/mine.yaml").write_text(
        "# one's own\nscore: {_target_: scores.mine, _partial_: true}\nlevel: element\nneeds: []\n"
    )
    result = prune("run", *QUICK, "criterion=mine")
    assert result.code == 2 and message in result.err and "starting" not in result.err, result.err


def test_a_last_batch_of_one_image_is_refused_where_norms_need_two(prune):
    keys = ("model=torchvision", "model.name=resnet18", "dataset=fake", "dataset.train=9", "dataset.shape=[3,32,32]")
    result = prune("run", "recipe=quickstart", *keys, "train.batch_size=8")
    assert result.code == 2 and "leaves one image of 9 for the last batch" in result.err, result.err
    assert prune("show", "recipe=quickstart", *keys, "train.batch_size=7", "finetune.batch_size=7").code == 0


def test_a_teacher_of_other_classes_is_refused_before_training(prune, workplace):
    from prune_cli.models.lenet import lenet5

    teacher = prune(
        "run", *QUICK, "dataset=cifar100", "dataset.fake=true", "stages=[train]", "model=lenet_300_100"
    ).folder
    keys = ("model=lenet_300_100", "dataset=cifar10", "dataset.fake=true", "distillation=hinton")
    result = prune("run", *QUICK, *keys, f"distillation.teacher={teacher / 'train'}")
    assert result.code == 2 and "100 classes" in result.err and "starting" not in result.err, result.err
    torch.save(lenet5(num_classes=10, in_shape=(1, 8, 8)).state_dict(), workplace / "lenet5.pt")
    result = prune("run", *QUICK, *keys, "distillation.teacher=lenet5.pt")
    assert result.code == 4 and "do not fit" in result.err and "starting" not in result.err, result.err


@pytest.mark.parametrize("granularity", ["element", "n_m", "stripe", "kernel", "pattern", "filter"])
def test_a_weight_that_layers_share_is_pruned_once(prune, own, granularity):
    whole = 8 * 9 + 8 + 8 * 8 * 9 + 2 * 8 + 8 * 10 + 10
    left = {
        "element": 18 + 8 + 144 + 16 + 20 + 10, "n_m": 72 + 8 + 144 + 16 + 20 + 10, "stripe": 18 + 144,
        "kernel": 18 + 8 + 144 + 16 + 90, "filter": 2 * 9 + 2 + 2 * 2 * 9 + 2 * 2 + 2 * 10 + 10,
    }  # fmt: skip
    keys = ("granularity.ratio=0.75", f"granularity={granularity}", "stages=[train,prune]")
    result = prune("run", *QUICK, "model=Tied", *keys)
    assert result.code == 0, result.err
    row = result.rows.loc["prune"]
    if granularity == "pattern":
        assert row.ratio_prunable == pytest.approx(0.75, abs=0.01)
    elif granularity == "stripe":  # its filters without stripes go too
        assert row.params_nonzero <= left["stripe"] + 8 + 16 + 90
    else:
        assert row.params_nonzero == left[granularity] < whole
    assert granularity != "filter" or row.params == left["filter"]
