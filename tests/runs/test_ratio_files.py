"""The ratio files that are derived: made by their script, and what they really remove is the published total."""

from __future__ import annotations

import runpy

import pytest
import torch
from torch import nn

from prune_cli.config.locations import options
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.weights import l1
from prune_cli.granularities.pattern import Pattern
from prune_cli.granularities.stripe import Stripe
from prune_cli.models.torchvision import torchvision
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from tests.conftest import ROOT

RATIOS = ROOT / "recipes" / "ratios"


def test_files_are_what_the_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ratios.py", str(tmp_path)])
    runpy.run_path(str(ROOT / "scripts" / "ratios.py"), run_name="__main__")
    written = sorted(tmp_path.iterdir())
    assert len(written) >= 8
    for path in written:
        assert path.read_text() == (RATIOS / path.name).read_text(), path.name


@pytest.mark.parametrize(
    ("name", "units", "total"),
    [("stripe", Stripe(), 0.4402), ("patdnn", Pattern(pattern_set="fixed5"), 0.6899)],
)
def test_convolutions_of_resnet18_lose_the_starred_total(name, units, total):
    model = torchvision(name="resnet18", num_classes=1000, in_shape=[3, 224, 224])
    granularity = Granularity(units, ratio_file=RATIOS / f"resnet18_imagenet_{name}.yaml")
    selection = select(granularity, Criterion(l1), model, torch.zeros(1, 3, 32, 32))
    weights = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    zeros = sum(int((~mask.expand_as(weights[key])).sum()) for key, mask in selection.masks.items())
    assert zeros / sum(weight.numel() for weight in weights.values()) == pytest.approx(total, abs=1e-3)


def test_no_ratio_file_lies_unused():
    named = "".join(path.read_text() for path in options("recipe").values())
    assert all(f"ratios/{path.name}" in named for path in RATIOS.iterdir())
