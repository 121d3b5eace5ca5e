"""What a pruned.yaml may name."""

from __future__ import annotations

import pytest

from prune_cli.config.compose import compose
from prune_cli.config.locations import options
from prune_cli.config.nodes import locate
from prune_cli.files import builders


@pytest.mark.parametrize("name", options("model"))
def test_every_shipped_model_may_be_named_by_a_file(name):
    keys = {"timm": ["model.name=resnet18"], "torchvision": ["model.name=resnet18"]}.get(name, [])
    node = compose([f"model={name}", *keys]).config["model"]
    arguments = {key: value for key, value in node.items() if key != "weights"}
    assert builders.require_ours(arguments, "test") is locate(node["_target_"], "model")
