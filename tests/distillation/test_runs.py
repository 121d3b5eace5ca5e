"""Distillation through the command line: after surgery, several terms, stopped and resumed, and what is refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors import safe_open

from prune_cli.files import pruned

FILTER = (
    "run", "recipe=quickstart", "granularity=filter", "granularity.ratio=0.5", "train.epochs=4", "latency=false",
    "device=cpu",
)  # fmt: skip
SHORT = (*FILTER, "limit_batches=2", "train.epochs=1", "finetune.epochs=1")


def sums(out: str) -> dict[str, str]:
    """The sha256 of every stage's weights, from the manifests."""
    stages = [path for path in Path(out.strip().splitlines()[-1]).iterdir() if path.is_dir()]
    manifests = {stage.name: json.loads((stage / "manifest.json").read_text())["files"] for stage in stages}
    return {name: files["weights.safetensors"] for name, files in manifests.items()}


@pytest.mark.parametrize("name", ["attention_transfer", "fitnet"])
def test_a_network_without_half_its_filters_learns_the_features_of_the_dense_one(prune, name):
    result = prune(*FILTER, "finetune.epochs=2", f"distillation={name}")
    assert result.code == 0, result.err
    rows = result.rows
    assert rows.loc["finetune", "params"] < 0.3 * rows.loc["train", "params"]
    assert rows.loc["finetune", "acc1"] > rows.loc["prune", "acc1"] + 5
    assert rows.loc["finetune", "distillation"] == name
    with safe_open(result.folder / "finetune" / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == set(pruned.load(result.folder / "finetune").state_dict()), "no regressor is left"


def test_terms_add_up_and_keys_of_each_can_be_set(prune):
    maps = ("+distillation@distillation.terms.maps=attention_transfer", "distillation.terms.maps.features=[conv2]")
    plain = prune(*SHORT, "distillation=hinton")
    off = prune(*SHORT, "distillation=hinton", *maps, "distillation.terms.maps.weight=0")
    both = prune(*SHORT, "distillation=hinton", *maps)
    for result in (plain, off, both):
        assert result.code == 0, result.err
    assert sums(off.out) == sums(plain.out), "a weight of 0 adds nothing, and the labels' weight is that of hinton"
    assert sums(both.out)["finetune"] != sums(plain.out)["finetune"]
    alone = prune(*SHORT, *maps, "distillation.terms.maps.teacher=dense")
    assert sums(alone.out)["finetune"] not in (sums(both.out)["finetune"], sums(plain.out)["finetune"])


def test_a_teacher_that_is_wider_and_its_features(prune):
    taught = prune(*SHORT, "model.widths=[30,60,40]", "stages=[train]")
    teacher = f"distillation.teacher={taught.folder}/train"
    result = prune(*SHORT, "distillation=fitnet", teacher, "distillation.features={fc1: fc1}", "stages=[finetune]")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("distillation=fitnet", "distillation.features=[conv3]"),
            "the student has no module 'conv3'; did you mean 'conv",
        ),
        (("distillation=fitnet", "distillation.features={conv1: conv9}"), "the teacher has no module 'conv9'"),
        (("distillation=fitnet", "distillation.features={conv1: conv2}"), "'conv1' gives (2, 20, 8, 8)"),
        (("distillation=attention_transfer", "distillation.features=[fc1]"), "on maps of one size, but 'fc1'"),
        (("distillation=attention_transfer", "distillation.features=[]"), "give features=auto or a list of modules"),
        (("distillation=fitnet", "distillation.features=some"), "distillation.features"),
        (("distillation=fitnet", "distillation.weight=-1"), "distillation.weight"),
        (("distillation=fitnet", "distillation.teacher=null"), "learns from a teacher"),
        (
            ("+distillation@distillation.terms.a=hinton", "distillation.terms.a.teacher=nowhere.pt"),
            "distillation.terms.a.teacher=nowhere.pt does not exist",
        ),
        (
            ("+distillation@distillation.terms.a=fitnet", "distillation.terms.a.features=[x]"),
            "distillation.terms.a.features: the student has no module 'x'",
        ),
        (("+distillation@distillation.terms.a=hinton", "stages=[finetune]"), "distillation.terms.a.teacher=dense"),
        (
            ("distillation=fitnet", "model=lenet_300_100", "granularity=element"),
            "features=auto takes the ends of stages",
        ),
    ],
)
def test_refused_before_training(prune, arguments, message):
    result = prune(*SHORT, *arguments)
    assert result.code == 2 and message in result.err, result.err
    assert "starting" not in result.err and len(result.err.strip().splitlines()) == 1


LONG = (
    "run", "recipe=lenet_digits_irre", "model=lenet5", "deterministic=true", "device=cpu", "latency=false", "limit_batches=6",
    "stages=[train,prune,finetune]", "distillation=fitnet", "train.epochs=1", "schedule.epochs=6",
    "schedule.retrain_epoch=3", "schedule.prune_freq=2", "finetune.epochs=6", "finetune.fit.ema=0.9",
    "prune.fit.checkpoint_seconds=0", "finetune.fit.checkpoint_seconds=0",
)  # fmt: skip


@pytest.mark.slow
def test_regressors_survive_kill_nine_and_a_polite_stop(spawn):
    out, err = spawn(*LONG, "hydra.run.dir=whole").communicate(timeout=300)
    whole = sums(out)
    # In another store, hit twice while pruning and once while fine-tuning.
    place = {"PRUNE_STORE": "other_store"}
    for fault in ("prune 20 SIGKILL", "prune 10 SIGTERM", "finetune 15 SIGKILL"):
        hit = spawn(*LONG, "hydra.run.dir=hit", FAULT=fault, **place)
        _, err = hit.communicate(timeout=300)
        assert hit.returncode == (-signal.SIGKILL if "KILL" in fault else 75), err
    again = spawn(*LONG, "hydra.run.dir=hit", **place)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "finetune: going on from epoch" in err
    assert sums(out) == whole
