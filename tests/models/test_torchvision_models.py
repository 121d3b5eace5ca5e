from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision import models as zoo

from prune_cli.errors import CheckpointError, ConfigError
from prune_cli.models.torchvision import torchvision


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub folder of its own, and no network."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("name", "in_shape"),
    [
        ("squeezenet1_1", (1, 33, 40)),
        ("regnet_x_400mf", (3, 32, 32)),
        ("googlenet", (1, 40, 40)),
        ("vit_b_32", (3, 64, 64)),
        ("mnasnet0_5", (2, 32, 32)),
    ],
)
def test_builds_for_the_data(name: str, in_shape: tuple[int, int, int]) -> None:
    model = torchvision(num_classes=7, in_shape=in_shape, name=name)
    with torch.no_grad():
        assert model.eval()(torch.randn(2, *in_shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet81"}, "did you mean 'resnet"),
        ({"name": "fcn_resnet50"}, "no classification network 'fcn_resnet50'"),
        ({"name": "alexnet"}, "alexnet does not take inputs of \\(3, 32, 32\\)"),
        ({"name": "vit_b_32", "in_shape": (3, 48, 48)}, "vit_b_32 can't be built for inputs of"),
        ({"name": "vit_b_32", "in_shape": (3, 64, 32)}, "square images"),
        ({"name": "resnet18", "pretrained": "IMAGENET1K_V7"}, "did you mean 'IMAGENET1K_V1'"),
        ({"name": "resnet18", "pretrained": True, "in_shape": (1, 32, 32)}, "take 3 channels"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        torchvision(**{"num_classes": 10, "in_shape": (3, 32, 32), **arguments})
    assert "\n" not in str(caught.value)


def test_failed_download_says_where_to_put_the_file(hub: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        torchvision(num_classes=10, in_shape=(3, 32, 32), name="squeezenet1_1", pretrained=True)
    message = str(caught.value)
    assert "\n" not in message and "no network here" in message
    assert str(hub / "squeezenet1_1-b8a52dc0.pth") in message
    assert "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth" in message


@pytest.mark.parametrize(
    ("name", "in_shape", "num_classes"),
    [
        ("squeezenet1_1", (3, 32, 32), 1000),
        ("squeezenet1_1", (3, 32, 32), 10),
        ("densenet121", (3, 32, 32), 10),
    ],
)
def test_pretrained_file_in_the_hub_folder(
    hub: Path, name: str, in_shape: tuple[int, int, int], num_classes: int
) -> None:
    """Old names of densenets and auxiliary classifiers are handled; other classes renew the head."""
    source = zoo.get_model(name, weights=None)
    state = {
        key.replace(".norm1.", ".norm.1.").replace(".conv1.", ".conv.1.") if "denselayer" in key else key: tensor
        for key, tensor in source.state_dict().items()
    }
    state["AuxLogits.fc.weight"] = torch.zeros(1000, 768)
    hub.mkdir(parents=True)
    weights = zoo.get_model_weights(name)["DEFAULT"]
    torch.save(state, hub / weights.url.rsplit("/", 1)[-1])  # type: ignore[attr-defined]
    model = torchvision(num_classes=num_classes, in_shape=in_shape, name=name, pretrained=True)
    heads = ("classifier.", "fc.")
    for key, tensor in model.state_dict().items():
        if num_classes == 1000 or not key.startswith(heads):
            assert torch.equal(tensor, source.state_dict()[key])
    with torch.no_grad():
        assert model.eval()(torch.randn(2, *in_shape)).shape == (2, num_classes)
