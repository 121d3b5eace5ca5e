"""Every option of the group ``model`` names a builder and only parameters that it has."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from prune_cli.config import option_files

OPTIONS = sorted((Path(__file__).parents[2] / "recipes" / "model").glob("*.yaml"))
IN_SHAPE = {"inception_v3": (3, 75, 75)}


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_option_builds(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ") and len(text.splitlines()[0]) > 10
    node: dict[str, Any] = {}
    for file in option_files.files(f"model/{path.stem}"):
        node |= yaml.safe_load(file.read_text())
    node.pop("defaults", None)
    assert node.pop("weights", "absent") is None
    module, _, name = node.pop("_target_").rpartition(".")
    builder = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(builder).parameters
    assert set(node) | {"num_classes", "in_shape"} == set(parameters)
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters.values())
    if path.stem == "timm":
        pytest.importorskip("timm")
    in_shape = IN_SHAPE.get(path.stem, (3, 32, 32))
    with torch.device("meta"), torch.no_grad():
        model = builder(num_classes=10, in_shape=in_shape, **node)
        assert isinstance(model, nn.Module)
        assert model.eval()(torch.empty(1, *in_shape)).shape == (1, 10)


def test_there_are_options() -> None:
    assert len(OPTIONS) >= 20
