"""From stage folders and model nodes back to networks."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from prune_cli.errors import CheckpointError, ConfigError, PruneError
from prune_cli.files.weights import write_weights
from prune_cli.pipeline.loading import build_architecture, load_teacher, restore
from prune_cli.tensors import state_sha256
from tests.session.tiny import DATA, begin

LENET = {"_target_": "prune_cli.models.lenet.lenet_300_100"}
OWN = """
import torch
from torch import nn

def plain(width: int = 3):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width))

def number():
    return 3

def broken():
    raise RuntimeError("no luck\\nand more")
"""


@pytest.fixture
def own(workplace):
    (workplace / "own_nets.py").write_text(OWN)
    sys.path.insert(0, str(workplace))
    yield
    sys.modules.pop("own_nets", None)


def test_a_builder_is_told_the_classes_and_the_shape_of_the_dataset():
    built = build_architecture(LENET, DATA, "lenet", 0)
    assert built.node == {**LENET, "num_classes": 4, "in_shape": [3, 8, 8]}
    assert built.build()(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert (
        build_architecture({**LENET, "num_classes": 7}, DATA, "lenet", 0).build()(torch.zeros(1, 3, 8, 8)).shape[1] == 7
    )


def test_a_builder_that_does_not_ask_is_told_nothing(own):
    assert build_architecture({"_target_": "own_nets.plain"}, DATA, "own", 0).node == {"_target_": "own_nets.plain"}


def test_fresh_weights_depend_on_the_seed_alone_and_leave_the_generator_where_it_was():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = build_architecture(LENET, DATA, "lenet", 0).build()
    assert torch.equal(torch.rand(1), expected)
    second, third = (build_architecture(LENET, DATA, "lenet", seed).build() for seed in (0, 1))
    assert state_sha256(first.state_dict()) == state_sha256(second.state_dict()) != state_sha256(third.state_dict())


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "own_nets.number"}, "made a int, not a torch module"),
        ({"_target_": "own_nets.broken"}, "own_nets.broken raised RuntimeError: no luck"),
        ({"_target_": "own_nets.plain", "widht": 3}, "widht"),
        ({"_target_": "own_nets.plain", "width": "a"}, "width"),
        ({"_target_": "own_nets.nothing"}, "nothing"),
    ],
)
def test_a_builder_that_fails_is_one_line(own, node, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_architecture(node, DATA, "own", 0).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("granularity", ["element", "filter", "stripe"])
def test_a_finished_stage_comes_back_whole(prune, tmp_path, granularity):
    result = prune(
        "run", "recipe=quickstart", "model=resnet20", "model.depth=8", "model.widths=[4,4,8]", "limit_batches=1",
        "train.epochs=1", "latency=false", "stages=[train,prune]", f"granularity={granularity}", "train.remember=[0]",
    )  # fmt: skip
    assert result.code == 0, result.err
    state = begin(tmp_path)
    trained, pruned = (restore(result.folder / stage, state) for stage in ("train", "prune"))
    assert set(trained.remembered) == {"0"} and not trained.masks and trained.lineage is None
    assert (pruned.lineage is None) == (granularity == "element")
    assert all(not pruned.model.state_dict()[name][~mask].any() for name, mask in pruned.masks.items())
    parameters = sum(parameter.numel() for parameter in pruned.model.parameters())
    assert parameters == result.rows.loc["prune", "params"] and not pruned.model.training
    assert set(pruned.forms) <= set(pruned.masks)


def test_a_teacher_is_frozen_and_may_be_weights_alone(tmp_path):
    state = begin(tmp_path)
    write_weights(state.model.state_dict(), tmp_path / "weights.safetensors")
    teacher = load_teacher(state, tmp_path / "weights.safetensors").model
    assert teacher is not state.model and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert state_sha256(teacher.state_dict()) == state_sha256(state.model.state_dict())


def test_a_teacher_is_read_once_until_its_file_changes(tmp_path):
    state = begin(tmp_path)
    file = tmp_path / "weights.safetensors"
    write_weights(state.model.state_dict(), file)
    first = load_teacher(state, file)
    assert load_teacher(state.evolve(stage="later"), file) is first
    write_weights({name: value + 1 for name, value in state.model.state_dict().items()}, file)
    assert state_sha256(load_teacher(state, file).model.state_dict()) != state_sha256(first.model.state_dict())


def test_weights_of_another_network_and_folders_without_a_network_are_no_teacher(tmp_path):
    state = begin(tmp_path)
    write_weights(nn.Linear(2, 2).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(PruneError, match="do not fit"):
        load_teacher(state, tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        load_teacher(state, tmp_path / "empty")
