"""A network whose numbers are none is never stored, and settings that are none are refused before anything is computed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from prune_cli.config.compose import compose
from prune_cli.config.locations import options
from prune_cli.config.nodes import resolve
from prune_cli.errors import ConfigError
from prune_cli.pipeline.build import resolve_steps
from prune_cli.pipeline.stage import training_of
from prune_cli.tensors import not_finite
from tests.config.test_overrides import leaves

QUICK = ("run", "recipe=quickstart", "limit_batches=1")


def test_names_of_tensors_with_values_that_are_no_numbers():
    state = {
        "a": torch.tensor([1.0, math.nan]),
        "b": torch.ones(2),
        "c": torch.tensor([-math.inf]),
        "n": torch.tensor(3),
    }
    assert not_finite(state) == ["a", "c"]
    assert not_finite({"h": torch.full((2,), math.inf, dtype=torch.bfloat16), "e": torch.empty(0)}) == ["h"]


@pytest.mark.parametrize("setting", ["train.optimizer.lr=1e38", "train.optimizer.weight_decay=1e38"])
def test_a_last_step_that_diverges_is_an_error_and_nothing_is_stored(prune, workplace, setting):
    result = prune(*QUICK, setting, "stages=[train,prune]")
    assert result.code == 5, result.err
    assert "train:" in result.err and "nothing of the stage is kept" in result.err
    left = {path.suffix for path in (workplace / "outputs/store").iterdir() if path.name != "runs"}
    assert left <= {".lock"}, "neither a result nor a checkpoint of the stage"


OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes: int, broken: bool = False):
        super().__init__()
        self.body = nn.Linear(64, num_classes)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("seen", torch.zeros(1))
        self.broken = broken
    def forward(self, x):
        if self.training and self.broken:
            self.seen += torch.inf
        return self.body(x.flatten(1)) + self.mask.softmax(1).sum() * 0
"""


def test_buffers_that_are_meant_to_be_infinite_stay_and_others_do_not(prune, workplace, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "masked_net", raising=False)
    (workplace / "masked_net.py").write_text(OWN)
    (workplace / "recipes/model").mkdir(parents=True)
    (workplace / "recipes/model/masked.yaml").write_text(
        "# a mask of -inf\n_target_: masked_net.Net\nbroken: false\nweights: null\n"
    )
    fine = prune(*QUICK, "model=masked", "stages=[train,prune]")
    assert fine.code == 0, fine.err
    broken = prune(*QUICK, "model=masked", "model.broken=true", "stages=[train,prune]")
    assert broken.code == 5 and "seen has values that are not finite" in broken.err, broken.err


def test_weights_of_ones_own_that_are_no_numbers_are_refused(prune, workplace):
    from prune_cli.models.lenet import lenet5

    network: nn.Module = lenet5(num_classes=10, in_shape=(1, 8, 8))
    with torch.no_grad():
        next(network.parameters())[0] = math.nan
    torch.save(network.state_dict(), "broken.pt")
    result = prune(*QUICK, "model.weights=broken.pt")
    assert result.code == 4 and "not finite" in result.err, result.err


def settings() -> list[Any]:
    """A recipe's overrides and the numbers of every option, each at a place where a run would use it."""
    stages = "[train,sparsify,prune,recalibrate,finetune,share,sensitivity,permute,sr_ste,skeleton]"
    base = ("recipe=quickstart", "model=resnet20", "dataset=fake", f"stages={stages}")
    found = []
    for group, place in (
        ("lr_schedule", "train.lr_schedule"), ("optimizer", "train.optimizer"), ("fit", "train.fit"),
        ("schedule", "schedule"), ("granularity", "granularity"), ("regulariser", "regulariser"),
        ("distillation", "distillation"), ("criterion", "criterion"), ("stage", ""), ("dataset", "dataset"),
    ):  # fmt: skip
        names = ["train"] if group == "stage" else options(group)
        for name in names:
            choice = [] if group == "stage" else [f"{group}@{place}={name}" if "." in place else f"{group}={name}"]
            found.append(pytest.param((*base, *choice), place, id=f"{group}={name}"))
    return found


NEVER_NEGATIVE = ("train.lr_schedule", "train.optimizer", "train.fit", "regulariser", "granularity")


@pytest.mark.parametrize(("overrides", "place"), settings())
def test_numbers_that_are_infinite_none_or_negative_are_refused_at_build(overrides, place, workplace):
    composed = compose(list(overrides))
    order = list(composed.config["stages"])
    checked = 0
    for path, value in leaves(composed.config):
        inside = path.startswith(f"{place}.") if place else path.split(".")[0] in order and path.count(".") == 1
        if not inside or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for wrong in (math.nan, math.inf, -math.inf, *([-1] if place in NEVER_NEGATIVE else [])):
            checked += 1
            with pytest.raises((ConfigError, ValueError)):
                refused(composed.config, composed.choices, order, path, wrong)
                pytest.fail(f"{path}={wrong} was taken")
    if place in ("train.lr_schedule", "train.optimizer"):
        assert checked


def refused(config: dict[str, Any], choices: dict[str, str], order: list[str], path: str, value: float) -> None:
    """Builds what a run checks before it reads data, with a key set wherever a stage takes it over."""
    config = copy.deepcopy(config)
    for prefix in ("", *(f"{stage}." for stage in order)):
        node: Any = config
        *parents, last = f"{prefix}{path}".split(".")
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if isinstance(node, dict) and last in node:
            node[last] = value
    if path.startswith("dataset."):
        resolve(config["dataset"], "dataset")
    for step in resolve_steps(order, config, choices):
        training = training_of(step.parameters)
        if training is not None:
            training.optimizer([nn.Parameter(torch.zeros(1))])
