"""What a pruned.yaml may name."""

from __future__ import annotations

import pytest
import yaml

from prune_cli.config.locations import options
from prune_cli.config.nodes import locate
from prune_cli.files import builders


@pytest.mark.parametrize("name", options("model"))
def test_every_shipped_model_may_be_named_by_a_file(name):
    content = yaml.safe_load(options("model")[name].read_text())
    arguments = {key: value for key, value in content.items() if key != "weights"}
    assert builders.require_ours(arguments, "test") is locate(content["_target_"], "model")
