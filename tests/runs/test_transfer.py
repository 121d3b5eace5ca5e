"""One's own images and a pretrained network, end to end, with a file of weights in torchvision's layout."""

from __future__ import annotations

import re

import pytest
import torch
from torchvision import models as zoo

from prune_cli.models.arguments import new_layers
from prune_cli.models.torchvision import torchvision
from tests.data.test_folders import make

NAME = "squeezenet1_1"
WORDS = ("recipe=transfer_filter", f"model.name={NAME}", "dataset.image_size=32", "limit_batches=1", "device=cpu")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub folder with weights for 1,000 classes under the name that torchvision downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "hub/hub/checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    url = zoo.get_model_weights(NAME)["DEFAULT"].url
    torch.save(zoo.get_model(NAME).state_dict(), folder / url.rsplit("/", 1)[-1])


def test_the_builder_says_which_layers_are_new(hub):
    shape = (3, 32, 32)
    made = torchvision(num_classes=2, in_shape=shape, name=NAME, pretrained=True)
    assert new_layers(made) == ("classifier.1",)
    assert new_layers(torchvision(num_classes=1000, in_shape=shape, name=NAME, pretrained=True)) == ()
    assert new_layers(torchvision(num_classes=2, in_shape=shape, name=NAME)) == ()


def test_head_then_all_then_smaller(prune, workplace, hub):
    make(workplace / "imgs", {"train": 12, "test": 6}, size=(40, 36))
    result = prune("run", *WORDS, "dataset.root=imgs")
    assert result.code == 0, result.err
    assert list(result.rows.index) == ["head", "train", "prune", "finetune"]
    assert result.rows.loc["prune", "speedup_macs"] >= 2
    (warning,) = [line for line in result.err.splitlines() if "warning" in line and "is new" in line]
    assert "classifier.1 is new, as the pretrained weights are for other classes than the 2 of image_folder" in warning
    assert "before it was ever trained" not in warning
    from safetensors.torch import load_file

    before = torch.load(next((workplace / "hub/hub/checkpoints").iterdir()), weights_only=True)
    head, everything = (load_file(result.folder / stage / "weights.safetensors") for stage in ("head", "train"))
    changed = {name for name in before if name.startswith("classifier") or not torch.equal(before[name], head[name])}
    assert changed == {"classifier.1.weight", "classifier.1.bias"}, "only the head is trained first"
    assert any(not torch.equal(head[name], everything[name]) for name in before if name.startswith("features"))


def test_pruning_before_the_head_was_trained_is_warned_of(prune, workplace, hub):
    make(workplace / "imgs", {"": 12}, size=(32, 32))
    result = prune("run", *WORDS, "dataset.root=imgs", "stages=[prune]")
    assert result.code == 0, result.err
    assert re.search(r"warning: .*prune chooses before it was ever trained.*recipe=transfer_filter", result.err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.only=[nothing]",), "train.only: there is no module 'nothing'"),
        (("train.only=[]",), "train.only"),
        (("train.only=heads",), "train.only"),
        (("model=resnet20", "train.only=[layer1]", "train.init=cfg:x.yaml"), "init makes all of it new"),
    ],
)
def test_parts_that_cannot_be_trained_alone_are_refused(prune, words, message):
    result = prune("run", "recipe=quickstart", "limit_batches=1", *words)
    assert result.code == 2 and message in result.err, result.err


def test_the_last_layer_of_a_network_without_new_ones_is_its_head(prune):
    result = prune("run", "recipe=quickstart", "limit_batches=1", "stages=[train]", "train.only=head")
    assert result.code == 0, result.err
