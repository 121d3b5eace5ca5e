"""Exported networks compute what the network computes, or are not written."""

from __future__ import annotations

import sys

import pandas
import pytest
import torch
from torch import nn

from prune_cli import save_pruned, shrink
from prune_cli.errors import CheckpointError, ConfigError
from prune_cli.files import exporting
from prune_cli.measure.semi_structured import two_of_four
from prune_cli.models.lenet import lenet5

SHAPE = (1, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()


@pytest.fixture
def onnx():
    """The packages of the extra `export`."""
    for name in exporting.EXTRA:
        pytest.importorskip(name)


@pytest.mark.thorough
def test_a_pruned_run_as_onnx_and_as_a_program_with_its_speed_beside_the_dense_one(prune, onnx, workplace):
    run = prune(
        "run", "recipe=quickstart", "granularity=filter", "limit_batches=1", "train.epochs=1", "finetune.epochs=1",
        "latency=false", "device=cpu",
    )  # fmt: skip
    result = prune("export", str(run.folder), "--compare")
    assert result.code == 0, result.err
    onnx_line, program_line, first, second = result.out.splitlines()
    assert f"{run.folder}/model.onnx" in onnx_line
    assert "batch sizes 1 and 5" in onnx_line
    assert "loaded again" in program_line
    assert "batch 1:" in first and "times faster" in first
    assert "batch 64:" in second
    from prune_cli import load_pruned

    images = torch.randn(7, *SHAPE)
    model = load_pruned(run.folder / "finetune")
    session = exporting._session(run.folder / "model.onnx")
    with torch.no_grad():
        wanted = model(images)
        assert torch.allclose(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), wanted, atol=1e-5)
        assert torch.equal(torch.export.load(run.folder / "model.pt2").module()(images), wanted)
    assert not list(run.folder.glob("*.data")), "one file only"
    dense = prune("export", str(run.folder / "train"), "--program", "dense.pt2")
    assert dense.code == 0, dense.err
    assert (workplace / "dense.pt2").stat().st_size > (run.folder / "model.pt2").stat().st_size
    assert dense.out.count("\n") == 1


def test_zeros_of_two_of_four_stay_in_the_onnx_file_for_engines_that_use_them(prune, onnx):
    import onnx as format
    from onnx import numpy_helper

    run = prune(
        "run", "recipe=quickstart", "granularity=n_m", "granularity.ratio=0.5", "stages=[train,permute,prune]",
        "model=lenet5", "dataset=digits", "limit_batches=1", "train.epochs=1", "latency=false", "device=cpu",
    )  # fmt: skip
    assert run.code == 0, run.err
    kept = pandas.read_csv(run.folder / "permute" / "permutation.csv")
    assert (kept.after >= kept.before).all() and (kept.bound >= kept.after - 1e-4).all() and len(kept) >= 4
    assert prune("export", str(run.folder)).code == 0
    tensors = format.load(run.folder / "model.onnx").graph.initializer
    weights = [torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in tensors if len(tensor.dims) > 1]
    assert len(weights) >= 4
    for weight in weights:  # of a linear layer perhaps transposed
        assert two_of_four(weight != 0) or two_of_four(weight.T != 0), tuple(weight.shape)


def test_a_folder_that_python_saved_is_exported_and_evaluated(prune, workplace):
    torch.manual_seed(0)
    small = shrink(lenet5(num_classes=10, in_shape=SHAPE), torch.zeros(1, *SHAPE), ratio=0.5)
    builder = {"_target_": "prune_cli.models.lenet.lenet5", "num_classes": 10, "in_shape": list(SHAPE)}
    save_pruned(small, workplace / "small", builder=builder)
    result = prune("export", "small", "--program", "small.pt2")
    assert result.code == 0, result.err
    evaluated = prune("evaluate", "small", "dataset=digits")
    assert evaluated.code == 0, evaluated.err
    count = sum(parameter.numel() for parameter in small.parameters())
    assert f"({count})" in evaluated.out


def test_a_network_of_ones_own_is_named_again(prune, workplace, monkeypatch):
    (workplace / "own_model.py").write_text(
        "from torch import nn\n"
        "def own(*, num_classes, in_shape):\n"
        "    return nn.Sequential(nn.Conv2d(in_shape[0], 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, num_classes))\n"
    )
    (workplace / "recipes/model").mkdir(parents=True)
    (workplace / "recipes/model/own.yaml").write_text("# my own\n_target_: own_model.own\nweights: null\n")
    run = prune(
        "run", "recipe=quickstart", "model=own", "granularity=filter", "limit_batches=1", "train.epochs=1",
        "stages=[train,prune]", "latency=false", "device=cpu",
    )  # fmt: skip
    assert run.code == 0, run.err
    refused = prune("export", str(run.folder), "--program", "own.pt2")
    assert refused.code == 4
    assert "own_model.own" in refused.err
    assert "model=" in refused.err
    named = prune("export", str(run.folder), "--program", "own.pt2", "model=own")
    assert named.code == 0, named.err


def test_a_file_that_computes_something_else_is_not_kept(onnx, tmp_path, monkeypatch):
    model = network()
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    for export, name in ((exporting.to_onnx, "a.onnx"), (exporting.to_program, "a.pt2")):
        with pytest.raises(CheckpointError, match="was not written"):
            export(model, SHAPE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_no_numbers_is_not_kept(onnx, tmp_path):
    model = network()
    with torch.no_grad():
        list(model.parameters())[-1].fill_(float("nan"))
    for export, name in ((exporting.to_onnx, "a.onnx"), (exporting.to_program, "a.pt2")):
        with pytest.raises(CheckpointError, match="was not written"):
            export(model, SHAPE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_opset_is_obeyed(onnx, tmp_path):
    import onnx as library

    exporting.to_onnx(network(), SHAPE, tmp_path / "a.onnx", opset=18)
    assert library.load(tmp_path / "a.onnx").opset_import[0].version == 18


def test_what_cannot_be_exported_is_one_line(tmp_path):
    class Depends(nn.Module):
        """Takes another path for other values."""

        def forward(self, x):
            return x.mean(1) if x.sum() > 0 else x.amax(1)

    with pytest.raises(ConfigError, match=r"cannot be exported by torch\.export") as error:
        exporting.to_program(Depends(), SHAPE, tmp_path / "a.pt2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 4, "nowhere"),
        ((".",), 4, "no finished stage"),
        ((".", "--opset", "x"), 2, "--opset"),
        ((".", "--program", "a.pt2", "--opset", "18"), 2, "--opset is for --onnx"),
    ],
)
def test_mistakes(prune, arguments, code, message):
    result = prune("export", *arguments)
    assert result.code == code, result.err
    assert message in result.err


def test_missing_extra_is_named(prune, workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = prune("export", ".")
    assert result.code == 2
    assert "onnxscript" in result.err
    assert "pip install 'prune-cli[export]'" in result.err
