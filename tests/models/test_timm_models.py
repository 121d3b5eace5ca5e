from __future__ import annotations

import sys

import pytest
import torch

from prune_cli.errors import CheckpointError, ConfigError
from prune_cli.models.timm import timm


def test_missing_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'prune-cli\[timm\]'"):
        timm(num_classes=10, in_shape=(3, 32, 32), name="resnet18d")


def test_builds_for_the_data() -> None:
    pytest.importorskip("timm")
    for name, in_shape in (("resnet10t", (1, 32, 32)), ("deit_tiny_patch16_224", (3, 32, 48))):
        model = timm(num_classes=7, in_shape=in_shape, name=name)  # type: ignore[arg-type]
        with torch.no_grad():
            assert model.eval()(torch.randn(2, *in_shape)).shape == (2, 7)


def test_unknown_name_shows_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match="did you mean 'resnet"):
        timm(num_classes=10, in_shape=(3, 32, 32), name="resnet19d")


def test_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("timm")
    create = library.create_model

    def offline(name: str, pretrained: bool, **arguments: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("no network here\nand a long explanation")
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr(library, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"no network here.*model.weights=PATH") as caught:
        timm(num_classes=10, in_shape=(3, 32, 32), name="resnet10t", pretrained=True)
    assert "\n" not in str(caught.value)
