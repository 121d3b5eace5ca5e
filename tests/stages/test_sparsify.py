"""The sparsify stage from the command line: what each regulariser does to a network, resuming, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from prune_cli.config.locations import options
from prune_cli.files.weights import read_state_dict

NET = (
    "recipe=resnet20_cifar10_filter", "dataset=fake", "model.depth=8", "model.widths=[4,4,8]", "dataset.shape=[3,8,8]",
    "threads=1", "device=cpu", "latency=false", "train.epochs=1", "train.batch_size=64", "sparsify.batch_size=64",
)  # fmt: skip


def weights(result, stage: str) -> dict[str, torch.Tensor]:
    return read_state_dict(result.folder / stage / "weights.safetensors")


@pytest.mark.parametrize("name", options("regulariser"))
def test_every_regulariser_runs_and_every_key_of_it_can_be_set(prune, name):
    result = prune("run", *NET, "stages=[train,sparsify,prune]", "sparsify.epochs=1", f"regulariser={name}")
    assert result.code == 0, result.err
    stored = json.loads((result.folder / "sparsify" / "checkpoint.json").read_text())
    assert stored["measured"]["sparse_norms"] == ("all" if name == "norm_scales" else None)


def test_slimming_shrinks_the_scales_and_only_the_inner_ones_where_asked(prune):
    long = ("stages=[train,sparsify]", "sparsify.epochs=3", "sparsify.optimizer.lr=0.05", "regulariser.strength=0.05")
    sizes = {}
    for mode in ("all", "inner"):
        result = prune("run", *NET, *long, f"regulariser.norms={mode}")
        assert result.code == 0, result.err
        after = {name: value for name, value in weights(result, "sparsify").items() if name.endswith("weight")}
        sizes[mode] = {name: value.abs().mean().item() for name, value in after.items() if value.dim() == 1}
    assert max(sizes["all"].values()) < 0.9
    inner = [name for name in sizes["inner"] if name.startswith("layer") and "bn1" in name]
    assert len(inner) == 3
    outer = set(sizes["inner"]) - set(inner)
    assert max(sizes["inner"][name] for name in inner) < min(sizes["inner"][name] for name in outer)


def test_growing_regularisation_empties_the_chosen_units(prune):
    result = prune(
        "run", *NET, "stages=[train,sparsify,prune]", "sparsify.epochs=8", "sparsify.optimizer.lr=0.05",
        "lr_schedule@sparsify.lr_schedule=constant", "regulariser=growing", "regulariser.delta=0.2",
        "regulariser.every=1", "regulariser.ceiling=4",
    )  # fmt: skip
    assert result.code == 0, result.err
    weight = weights(result, "sparsify")["layer1.0.conv1.weight"]
    norms = weight.abs().flatten(1).sum(1).sort().values
    assert norms[1] < 0.01 * norms[2]  # two of four filters are all but gone
    assert result.rows.acc1["prune"] == pytest.approx(result.rows.acc1["sparsify"], abs=1.0)


def thorough(value: int) -> object:
    return pytest.param(value, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    "keys",
    [
        ("regulariser=growing", "regulariser.every=3", "regulariser.delta=0.05", "regulariser.choose_at=0.2"),
        ("regulariser=group_lasso", "regulariser.strength=0.01"),
    ],
)
@pytest.mark.parametrize(
    "stop_after", [thorough(5), 14, pytest.param(19, marks=pytest.mark.slow)]
)  # before the choice, which falls into step 13, and after it
def test_stopping_and_going_on_gives_the_same_bits(prune, monkeypatch, keys, stop_after):
    from prune_cli.training import fit as loop

    whole = (*NET, "stages=[train,sparsify]", "sparsify.epochs=3", *keys, "sparsify.fit.checkpoint_seconds=0")
    monkeypatch.setenv("PRUNE_STORE", "whole")
    first = prune("run", *whole)
    assert first.code == 0, first.err
    monkeypatch.setenv("PRUNE_STORE", "parts")
    assert prune("run", *whole, "stages=[train]").code == 0

    def interrupting(*arguments, **options):
        count = iter(range(1, 1000))
        return original(*arguments, **options | {"stop": lambda: next(count) >= stop_after})

    original = loop.fit
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", interrupting)
        assert prune("run", *whole).code == 75
    second = prune("run", *whole)
    assert second.code == 0, second.err
    assert "going on from epoch" in second.err
    pairs = zip(weights(first, "sparsify").values(), weights(second, "sparsify").values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("norms", ["all", "inner"])
@pytest.mark.parametrize("dependency", ["group", "union_keep", "inner_only"])
def test_pruning_looks_at_the_norms_that_were_made_sparse(prune, norms, dependency):
    keys = (f"regulariser.norms={norms}", f"granularity.dependency={dependency}", "sparsify.epochs=1")
    result = prune("run", *NET, "stages=[train,sparsify,prune]", *keys)
    if (norms == "inner") == (dependency == "inner_only"):
        assert result.code == 0, result.err
    else:
        assert result.code == 2
        assert f"regulariser.norms={norms}, which goes with dependency=" in result.err
        assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("regulariser.strength=-1",), "regulariser.strength"),
        (("regulariser.norms=outer",), "'all' or 'inner'"),
        (("regulariser=growing", "regulariser.choose_at=2"), "never reached"),
        (("regulariser=growing", "regulariser.ceilign=2"), "ceiling"),
        (("regulariser=slimming",), "norm_scales"),
        (("model=lenet5",), "batch norms"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_training(prune, keys, expected):
    net = [text for text in NET if keys[0] != "model=lenet5" or not text.startswith("model.")]
    result = prune("run", *net, "stages=[train,sparsify]", *keys)
    assert result.code == 2
    assert expected in result.err
    assert len(result.err.strip().splitlines()) == 1
