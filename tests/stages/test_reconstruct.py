"""The stages that fit a pruned network to the dense one: exact masks, better accuracy, resuming, refusals."""

from __future__ import annotations

import pytest
import torch

from prune_cli.files.weights import read_state_dict
from prune_cli.session import reconstructing
from tests.session.tiny import Cut

DIGITS = (
    "run", "recipe=quickstart", "model=resnet20", "model.depth=8", "model.widths=[8,8,16]", "train.epochs=6",
    "latency=false", "device=cpu", "threads=1", "deterministic=true",
)  # fmt: skip


def run(prune, *arguments):
    return prune(*DIGITS, *arguments)


def weights(result, stage: str) -> dict[str, torch.Tensor]:
    return read_state_dict(result.folder / stage / "weights.safetensors")


@pytest.mark.parametrize(
    "keys",
    [
        ("granularity=element", "granularity.ratio=0.9"),
        pytest.param(("granularity=filter", "granularity.ratio=0.6"), marks=pytest.mark.thorough),
        pytest.param(
            ("granularity=filter", "granularity.ratio=0.6", "granularity.shrink=false"), marks=pytest.mark.thorough
        ),
        pytest.param(("granularity=n_m", "granularity.ratio=0.75"), marks=pytest.mark.thorough),
    ],
    ids=["element", "filter", "filter masks", "n_m"],
)
def test_what_is_left_comes_nearer_to_the_dense_network(prune, keys):
    result = run(prune, "stages=[train,prune,reconstruct]", "reconstruct.calibration.images=400", *keys)
    assert result.code == 0, result.err
    acc1 = result.rows.acc1
    assert acc1["reconstruct"] > acc1["prune"] + 2
    before, after = (weights(result, stage) for stage in ("prune", "reconstruct"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    weight = "layer1.0.conv1.weight"
    assert torch.equal(before[weight] == 0, after[weight] == 0) and not torch.equal(before[weight], after[weight])
    assert (result.rows.params_nonzero["reconstruct"]) <= result.rows.params_nonzero["prune"]


@pytest.mark.parametrize(
    "keys",
    [
        ("granularity=element", "granularity.ratio=0.95"),
        pytest.param(("granularity=n_m", "granularity.ratio=0.75"), marks=pytest.mark.thorough),
    ],
    ids=["element", "n_m"],
)
def test_the_surgeon_removes_what_is_asked_and_is_no_worse_than_magnitudes_with_the_same_refit(prune, keys):
    small = ("obc.calibration.images=400", *keys)
    plain = run(
        prune, "stages=[train,prune,reconstruct]", "reconstruct.calibration.images=400", "criterion=l2", *small[1:]
    )
    assert plain.code == 0, plain.err
    result = run(prune, "stages=[train,obc]", *small)
    assert result.code == 0, result.err
    row = result.rows.loc["obc"]
    assert row.ratio_prunable == pytest.approx(row.ratio_requested, abs=0.02)
    assert row.ratio_prunable == pytest.approx(plain.rows.ratio_prunable["prune"], abs=1e-9)
    assert (
        row.acc1 > plain.rows.acc1["prune"] and row.acc1 >= plain.rows.acc1["reconstruct"] - 5
    )  # N:M leaves little to choose
    if "n_m" in keys[0]:
        weight = weights(result, "obc")["layer1.0.conv1.weight"]
        groups = (weight[:, : weight.shape[1] // 4 * 4] != 0).unflatten(1, (-1, 4)).sum(2)
        assert int(groups.max()) == 1


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["reconstruct", pytest.param("obc", marks=pytest.mark.slow)])
def test_a_stage_that_was_cut_goes_on_behind_the_last_layer_with_the_same_bytes(prune, monkeypatch, workplace, stage):
    stages = {"reconstruct": "[train,prune,reconstruct]", "obc": "[train,obc]"}[stage]
    arguments = (
        f"stages={stages}", f"{stage}.calibration.images=60", "granularity=element", "granularity.ratio=0.8",
    )  # fmt: skip
    calm = weights(run(prune, *arguments), stage)
    monkeypatch.setenv("PRUNE_STORE", str(workplace / "other"))
    fit, fitted = reconstructing._fit, []

    def cut(*given):
        fitted.append(given[1])
        if len(fitted) == 4:
            raise Cut
        fit(*given)

    with monkeypatch.context() as patch:
        patch.setattr(reconstructing, "_fit", cut)
        patch.setattr(reconstructing, "SAVE_SECONDS", -1.0)
        with pytest.raises(Cut):
            run(prune, *arguments)
    layers = [name for name, value in calm.items() if value.dim() > 1]
    fitted.clear()
    monkeypatch.setattr(reconstructing, "_fit", lambda *given: (fitted.append(given[1]), fit(*given)))
    again = run(prune, *arguments)
    assert again.code == 0 and "going on behind layer 3" in again.err, again.err
    assert len(fitted) == len(layers) - 3
    after = weights(again, stage)
    assert all(torch.equal(value, after[name]) for name, value in calm.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stages=[train,reconstruct]",), "nothing was pruned before it"),
        (("stages=[obc]", "granularity.scope=global"), "granularity.scope=layer"),
        (("stages=[obc]", "granularity=filter"), "obc"),
        (("stages=[obc]", "granularity.ratio=0"), "granularity.ratio"),
        (("stages=[obc]", "obc.damping=0"), "obc.damping"),
    ],
)
def test_what_cannot_work_is_refused_before_training(prune, workplace, arguments, message):
    result = prune(*DIGITS, *arguments)
    assert result.code == 2 and message in result.err, result.err
    assert "starting" not in result.err
