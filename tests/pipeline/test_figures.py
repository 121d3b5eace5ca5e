"""Every figure of results.csv and layers.csv that arithmetic can give, from the weights on disk: torch's counter, loops."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prune_cli import load_pruned
from prune_cli.files.weights import read_state_dict
from prune_cli.models.lenet import lenet5
from prune_cli.models.resnet_cifar import resnet_cifar

SHAPE = (1, 8, 8)
NETS = {
    "lenet5": (("model=lenet5",), lambda: lenet5(num_classes=10, in_shape=SHAPE)),
    "resnet20": (
        ("model=resnet20", "model.depth=8", "model.widths=[4,8,8]", "model.shortcut=B"),
        lambda: resnet_cifar(num_classes=10, in_shape=SHAPE, depth=8, widths=(4, 8, 8), shortcut="B"),
    ),
}


def network(folder: Path, build) -> nn.Module:
    """The network of a stage, as its files say."""
    if (folder / "pruned.yaml").exists():
        return load_pruned(folder)
    model = build()
    model.load_state_dict(read_state_dict(folder / "weights.safetensors"))
    return model.eval()


def flops_by_module(model: nn.Module) -> dict[str, int]:
    """Multiply-adds of one image per module, by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *SHAPE))
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    prefix = f"{type(model).__name__}."
    return {name.removeprefix(prefix): count for name, count in counts.items()} | {"": counts["Global"]}


def nonzero(values) -> int:
    """By a plain loop."""
    count = 0
    for value in values.flatten().tolist():
        count += value != 0
    return count


class Figures:
    """What the tables say, each compared once."""

    def __init__(self) -> None:
        self.compared = 0

    def same(self, got, expected, **tolerance) -> None:
        self.compared += 1
        assert got == pytest.approx(expected, **(tolerance or {"rel": 1e-12, "abs": 1e-12}))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("granularity", ["element", "filter", "kernel"])
def test_figures_by_arithmetic(prune, net, granularity):
    overrides, build = NETS[net]
    result = prune(
        "run", "recipe=quickstart", *overrides, f"granularity={granularity}", "granularity.ratio=0.6", "train.epochs=1",
        "finetune.epochs=1", "latency=false", "device=cpu",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows, layers = result.rows, pandas.read_csv(result.folder / "layers.csv").set_index(["stage", "layer"])
    figures, dense = Figures(), None
    for stage in ("train", "prune", "finetune"):
        model, row = network(result.folder / stage, build), rows.loc[stage]
        macs, parameters = flops_by_module(model), dict(model.named_parameters())
        convs = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        dense = dense or (model, macs[""])
        params = {name: value.numel() for name, value in parameters.items()}
        alive = {name: nonzero(value) for name, value in parameters.items()}
        whole, left = sum(parameter.numel() for parameter in dense[0].parameters()), sum(alive.values())
        conv_weights = [dense[0].get_parameter(f"{name}.weight").numel() for name in convs]
        figures.same(row.params, sum(params.values()))
        figures.same(row.params_nonzero, left)
        figures.same(row.sparsity, 1 - left / sum(params.values()))
        figures.same(row.ratio_total, 1 - left / whole)
        figures.same(row.ratio_conv, 1 - sum(alive[f"{name}.weight"] for name in convs) / sum(conv_weights))
        figures.same(row.macs, macs[""])
        figures.same(row.flops, 2 * macs[""])
        figures.same(row.compression, whole / left)
        figures.same(row.speedup_macs, dense[1] / macs[""])
        figures.same(row.bytes, sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]))
        reached = 0.0
        for name, module in model.named_modules():
            own = [key for key in parameters if key.rpartition(".")[0] == name]
            if not own:
                continue
            line, weight = layers.loc[stage, name], f"{name}.weight"
            figures.same(line.params, sum(params[key] for key in own))
            figures.same(line.params_nonzero, sum(alive[key] for key in own))
            figures.same(line.weights_nonzero, alive[weight])
            figures.same(line.sparsity, 1 - sum(alive[key] for key in own) / sum(params[key] for key in own))
            figures.same(line.macs, macs.get(name, 0))
            products = macs.get(name, 0) * alive[weight] / params[weight]
            figures.same(line.macs_nonzero, products, abs=0.5)
            assert line.weight_shape == "x".join(map(str, module.weight.shape))
            reached += products
        figures.same(row.macs_nonzero, reached, abs=len(parameters) / 2)
    assert figures.compared >= 100


def test_the_starred_ratio_counts_weights_alone(prune):
    """Biases stay, so a ratio over all parameters of the convolutions would be less than what was asked."""
    result = prune(
        "run", "recipe=quickstart", "granularity.ratio=0.8", "stages=[prune]", "latency=false", "device=cpu", "dataset=fake",
        "granularity.rules=[{types: [Conv2d]}]",
    )  # fmt: skip
    assert result.code == 0, result.err
    model = load_pruned(result.folder / "prune")
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convs)
    gone = sum(int(0.8 * conv.weight.numel() + 1e-9) for conv in convs)
    assert result.rows.ratio_conv["prune"] == pytest.approx(gone / sum(conv.weight.numel() for conv in convs))
