"""Filter recipes from the command line: really smaller, fine-tuned, and the same network in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from prune_cli.errors import SurgeryError
from prune_cli.files import pruned
from prune_cli.files.weights import read_state_dict
from prune_cli.granularities.filter import kept_units
from prune_cli.structure import slicing, surgery, verified
from prune_cli.structure.follow import analyse
from prune_cli.structure.keep import lowest_units
from tests.conftest import ROOT

FILTER = (
    "recipe=quickstart", "granularity=filter", "granularity.ratio=0.5", "limit_batches=2", "train.epochs=1",
    "finetune.epochs=1", "latency=false", "device=cpu",
)  # fmt: skip


def test_filters_shrink_train_on_and_reload_in_a_fresh_process(prune):
    result = prune("run", *FILTER, "distillation=hinton")
    assert result.code == 0, result.err
    rows = result.rows
    assert rows.loc["finetune", "params"] < 0.3 * rows.loc["train", "params"]
    assert rows.loc["finetune", "params"] == rows.loc["finetune", "params_nonzero"]
    assert rows.loc["finetune", "macs"] < 0.5 * rows.loc["train", "macs"]
    assert rows.loc["finetune", "compression"] == rows.loc["train", "params"] / rows.loc["finetune", "params"]
    assert rows.loc["finetune", "speedup_macs"] == rows.loc["train", "macs"] / rows.loc["finetune", "macs"]
    code = (
        "import sys, torch; from prune_cli import load_pruned\n"
        "images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad(): print(load_pruned(sys.argv[1])(images).flatten().tolist())"
    )
    folder = result.folder / "finetune"
    fresh = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert fresh.returncode == 0, fresh.stderr
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    state = read_state_dict(folder / "weights.safetensors")
    assert state["fc1.weight"].shape == (250, 100)
    with torch.no_grad():
        assert fresh.stdout.strip() == str(pruned.load(folder)(images).flatten().tolist())
    evaluated = prune("evaluate", str(result.folder))
    assert evaluated.code == 0, evaluated.err
    assert f"acc1 {rows.loc['finetune', 'acc1']:.2f}" in evaluated.out
    assert f"({int(rows.loc['finetune', 'params'])})" in evaluated.out
    file = prune("evaluate", f"{folder}/weights.safetensors", "model=lenet5", "dataset=digits")
    assert file.out == evaluated.out, file.err
    assert yaml.safe_load((folder / "pruned.yaml").read_text())["dense_sha256"] == rows.loc["finetune", "dense_sha256"]


def test_a_second_round_shrinks_the_small_network_and_the_store_brings_it_back(prune):
    stages = "stages=[train,prune,finetune,prune,finetune]"
    first, second = prune("run", *FILTER, stages), prune("run", *FILTER, stages)
    assert first.code == 0, first.err
    rows = first.rows
    assert rows.params.is_monotonic_decreasing
    assert rows.loc["prune_2", "params"] < 0.4 * rows.loc["prune", "params"]
    assert second.err.count("taken from the store") == 5
    assert second.rows.drop(columns="seconds").equals(rows.drop(columns="seconds"))
    assert pruned.load(second.folder / "finetune_2").conv1.out_channels == 5


def test_masks_stay_where_shrink_is_off(prune):
    result = prune("run", *FILTER, "granularity.shrink=false")
    assert result.code == 0, result.err
    assert result.rows.params.nunique() == 1
    assert result.rows.loc["finetune", "macs_nonzero"] < 0.5 * result.rows.loc["finetune", "macs"]
    shrunk = prune("run", *FILTER)
    assert result.rows.loc["prune", "loss"] == pytest.approx(shrunk.rows.loc["prune", "loss"], rel=1e-5)


def test_units_that_cannot_be_taken_out_are_refused(prune):
    result = prune("run", *FILTER[2:], "recipe=quickstart", "granularity.shrink=true")
    assert result.code == 2
    assert "granularity.shrink" in result.err


@pytest.mark.thorough
@pytest.mark.parametrize(("model", "epochs"), [pytest.param("resnet18", 4, marks=pytest.mark.slow), ("vgg11", 4)])
def test_from_scratch_in_the_widths_of_a_pruned_network(prune, model, epochs):
    first = prune("run", *FILTER, f"model={model}", "stages=[prune]", "prune.batch_size=4", "limit_batches=1")
    assert first.code == 0, first.err
    small = first.rows.loc["prune"]
    scratch = (
        "run", "recipe=quickstart", "stages=[train]", f"model={model}", "limit_batches=1", "latency=false",
        "train.epochs=2", "train.batch_size=4", f"train.init=cfg:{first.folder}/prune/pruned.yaml",
    )  # fmt: skip
    same_epochs, same_compute = prune(*scratch), prune(*scratch, "train.init_budget=compute")
    assert same_epochs.code == same_compute.code == 0, same_epochs.err + same_compute.err
    assert same_epochs.rows.loc["train", "params"] == small.params
    assert same_epochs.rows.loc["train", "macs"] == small.macs
    assert same_epochs.rows.loc["train", "epochs"] == 2
    assert small.speedup_macs > 2
    assert same_compute.rows.loc["train", "epochs"] == epochs
    again = prune(*scratch)
    assert again.err.count("taken from the store") == 1
    assert prune("evaluate", str(again.folder)).code == 0


@pytest.mark.parametrize(
    ("content", "model", "message"),
    [
        ("cfg: [[64], [64, 64]]", "resnet18", "has 2 rows"),
        ("cfg: [64, M]", "vgg16", "does not follow VGG-16"),
        ("cfg: [64, x]", "vgg16", "not a positive width"),
        ("widths: [1]", "vgg16", "no `cfg:`"),
        ("cfg: [64, M]", "lenet5", "not built from a cfg"),
        ("cfg: [", "vgg16", "is no YAML of plain values"),
    ],
)
def test_a_cfg_that_does_not_fit_is_refused_before_training(prune, workplace, content, model, message):
    (workplace / "widths.yaml").write_text(content)
    result = prune("run", "recipe=quickstart", f"model={model}", "train.init=cfg:widths.yaml")
    assert result.code == 2
    assert message in result.err
    assert not list(workplace.glob("outputs/store/*"))


def test_a_changed_cfg_file_trains_again(prune, workplace):
    cfg = [[8]] + [[8, 8]] * 2 + [[16, 16]] * 2 + [[16, 16]] * 2 + [[16, 16]] * 2
    scratch = (
        "run", "recipe=quickstart", "stages=[train]", "model=resnet18", "limit_batches=1", "latency=false",
        "train.epochs=1", "train.batch_size=4", "train.init=cfg:widths.yaml",
    )  # fmt: skip
    (workplace / "widths.yaml").write_text(yaml.safe_dump({"cfg": cfg}))
    first = prune(*scratch)
    cfg[1] = [6, 8]
    (workplace / "widths.yaml").write_text(yaml.safe_dump({"cfg": cfg}))
    second = prune(*scratch)
    assert first.code == second.code == 0, second.err
    assert second.rows.loc["train", "params"] < first.rows.loc["train", "params"]


def test_a_teacher_may_be_a_pruned_network_of_another_architecture(prune):
    taught = prune("run", *FILTER, "stages=[train,prune]")
    result = prune(
        "run", *FILTER, "model=lenet_300_100", "stages=[finetune]", "distillation=hinton",
        f"distillation.teacher={taught.folder}/prune",
    )  # fmt: skip
    assert result.code == 0, result.err


def test_kept_units_are_those_that_the_masks_were_made_from():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 16, 4))
    plan = analyse(model, torch.zeros(1, 3, 6, 6))
    keep = lowest_units(plan, ratio=0.5)
    assert (kept_units(model, plan, slicing.structured_masks(model, plan, keep))[1:] == keep[1:]).all()
    assert kept_units(model, plan, {})[1:].all()


def test_a_shrunk_network_that_says_something_else_is_an_error():
    class Wrong:
        """Takes other units out than the masks say."""

        def shrink(self, model, example_inputs, masks):
            plan = analyse(model, example_inputs)
            keep = lowest_units(plan, ratio=0.5)
            found = surgery.remove_units(model, plan, keep)
            with torch.no_grad():
                next(found.model.parameters()).mul_(1.01)
            return found

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    image = torch.rand(1, 3, 6, 6)
    with pytest.raises(SurgeryError, match="differs from the masked one"):
        verified.shrink(Wrong(), model, image, {}, check_on=[image])
