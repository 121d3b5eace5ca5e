"""Weights of another network's making: what fits, what is renamed, and what is said where nothing does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.errors import CheckpointError
from prune_cli.files.fitting import fit_weights
from prune_cli.tensors import state_sha256
from tests.files.test_weights import Net, same


# ---------------------------------------------------------------------------------------------------- fitting
def test_mismatches_are_listed_on_one_line() -> None:
    model = Net(classes=3)
    before = state_sha256(model.state_dict())
    state = Net(classes=7).state_dict()
    state["extra.weight"] = torch.zeros(2, 5)
    del state["bn1.running_mean"]
    with pytest.raises(CheckpointError) as caught:
        fit_weights(model, state, "old.pth")
    message = str(caught.value)
    assert "\n" not in message
    assert "old.pth do not fit Net" in message
    assert "missing 1: bn1.running_mean [4]" in message
    assert "unexpected 1: extra.weight [2, 5]" in message
    assert "wrong size 2: linear.weight [7, 4] should be [3, 4], linear.bias [7] should be [3]" in message
    assert state_sha256(model.state_dict()) == before


def test_long_lists_are_counted() -> None:
    with pytest.raises(CheckpointError, match=r"missing 8: .*bn1.bias \[4\] and 4 more"):
        fit_weights(Net(), {"x": torch.zeros(1)}, "x")


def test_missing_batch_counters_are_no_error() -> None:
    state = Net().state_dict()
    del state["bn1.num_batches_tracked"]
    model = Net()
    fit_weights(model, state, "x")
    assert torch.equal(model.conv1.weight, state["conv1.weight"])


def test_integers_are_no_weights() -> None:
    state = Net().state_dict()
    state["linear.weight"] = state["linear.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"linear.weight \[3, 4\] int8 should be \[3, 4\]"):
        fit_weights(Net(), state, "x")


def test_half_precision_is_converted() -> None:
    model = Net()
    state = {key: t.half() if t.is_floating_point() else t for key, t in Net().state_dict().items()}
    fit_weights(model, state, "x")
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float())


@pytest.mark.parametrize(("old", "new"), [("fc", "linear"), ("linear", "head"), ("fc", "out")])
def test_one_renamed_module_is_accepted_and_logged(old: str, new: str, caplog: pytest.LogCaptureFixture) -> None:
    source, model = Net(old), Net(new)
    with caplog.at_level("INFO"):
        fit_weights(model, source.state_dict(), "old.pth")
    assert torch.equal(model.get_submodule(new).weight, source.get_submodule(old).weight)
    assert f"{old} of the file is {new} of the network" in caplog.text


def test_nested_and_top_level_renamings() -> None:
    source = nn.Sequential()
    source.add_module("backbone", Net())
    model = Net()
    fit_weights(model, source.state_dict(), "x")
    assert same(model.state_dict(), source[0].state_dict())
    fit_weights(source, Net().state_dict(), "x")
    deeper = Net()
    deeper.add_module("linear", nn.Sequential(nn.Linear(4, 3)))
    fit_weights(deeper, model.state_dict(), "x")
    assert torch.equal(deeper.state_dict()["linear.0.weight"], model.state_dict()["linear.weight"])


def test_renamings_that_do_not_fit_or_are_two_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"missing 2: linear.*unexpected 2: fc"):
        fit_weights(Net(classes=3), Net("fc", classes=4).state_dict(), "x")
    state = Net().state_dict()
    state["fc.weight"], state["fc.bias"] = state.pop("linear.weight"), state.pop("linear.bias")
    state["stem.weight"] = state.pop("conv1.weight")
    state["stem.bias"] = state.pop("conv1.bias")
    with pytest.raises(CheckpointError, match="missing 4"):
        fit_weights(Net(), state, "x")
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    swapped = nn.ModuleDict({"c": nn.Linear(2, 2), "d": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match="missing 4"):
        fit_weights(model, swapped.state_dict(), "x")
