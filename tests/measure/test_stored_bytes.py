"""Bytes that a masked network needs, in the tables: by hand per granularity, and inherited by later stages."""

from __future__ import annotations

import pandas
import pytest
import torch

from prune_cli.compression.gaps import fillers
from prune_cli.files.weights import read_state_dict

NET = (
    "run", "recipe=resnet20_cifar10_irre", "latency=false", "device=cpu", "threads=1", "dataset=fake",
    "model.depth=8", "model.widths=[8,8,16]", "dataset.shape=[3,8,8]", "limit_batches=1", "criterion=l2",
    "finetune.epochs=1", "schedule=one_shot",
)  # fmt: skip


def whole(bits: int) -> int:
    return -(-bits // 8)


def single(mask: torch.Tensor) -> int:
    """Single weights by the cheapest of a bitmap and gap codes of 4 and 8 bits, or dense."""
    kept = int(mask.sum())
    gaps = [whole((kept + fillers(mask, g)) * 32) + whole((kept + fillers(mask, g)) * g) for g in (4, 8)]
    return min(4 * kept + whole(mask.numel()), *gaps, 4 * mask.numel())


def n_m(mask: torch.Tensor) -> int:
    rest = mask.shape[1] % 4
    kept = mask.shape[0] * mask[0, 0].numel() * (mask.shape[1] // 4 * 2 + min(rest, 2))
    return 4 * kept + whole(2 * kept)


def stripe(mask: torch.Tensor) -> int:
    return int(mask[:, 0].sum()) * 4 * mask.shape[1] + whole(mask[:, 0].numel()) if mask.shape[2] > 1 else single(mask)


def kernel(mask: torch.Tensor) -> int:
    return int(mask[:, :, 0, 0].sum()) * 4 * 9 + whole(mask[:, :, 0, 0].numel())


def pattern(mask: torch.Tensor) -> int:
    kept = int(mask.flatten(2).any(2).sum())
    return kept * 4 * 4 + whole(kept * 3) + whole(mask.shape[0] * mask.shape[1]) + whole(8 * 9)


def filters(mask: torch.Tensor) -> int:
    return 4 * int(mask.sum()) + whole(sum(mask.shape[:2]))


KINDS = {
    "element": (("granularity.ratio=0.8",), single, "element"),
    "n_m": (("granularity.ratio=0.5",), n_m, "n_m"),
    "stripe": (("granularity.ratio=0.4", "granularity.shrink=false"), stripe, "stripe"),
    "kernel": (("granularity.ratio=0.6",), kernel, "kernel"),
    "pattern": (("granularity.ratio=0.7",), pattern, "pattern"),
    "filter": (("granularity.ratio=0.5", "granularity.shrink=false"), filters, "filters"),
}


@pytest.mark.parametrize("granularity", KINDS)
def test_bytes_by_hand_and_in_a_later_stage(prune, granularity):
    keys, cost, name = KINDS[granularity]
    result = prune(*NET, f"granularity={granularity}", *keys, "stages=[prune,finetune]", "finetune.batch_size=8")
    assert result.code == 0, result.err
    tables = pandas.read_csv(result.folder / "layers.csv")
    masks = read_state_dict(result.folder / "prune/masks.safetensors")
    weights = read_state_dict(result.folder / "prune/weights.safetensors")
    full = {key: mask.bool().expand(weights[key].shape) for key, mask in masks.items()}
    seen, total = 0, 0
    for stage in ("prune", "finetune"):
        layers = tables.query(f"stage == '{stage}'").set_index("layer")
        for key, value in weights.items():
            layer, _, last = key.rpartition(".")
            needed = value.nbytes if key not in full else min(cost(full[key]), value.nbytes)
            total += needed if stage == "prune" else 0
            if last == "weight" and key in full and value.dim() > 1:
                others = sum(
                    v.nbytes if k not in full else min(cost(full[k]), v.nbytes)
                    for k, v in weights.items() if k.rpartition(".")[0] == layer and k != key
                )  # fmt: skip
                assert layers.loc[layer, "bytes_stored"] == needed + others, key
                assert layers.loc[layer, "format"] == (name if needed < value.nbytes else "dense")
                seen += 1
        parts = layers[[f"bytes_{part}" for part in ("values", "indices", "bitmaps", "codebooks")]].sum(axis=1)
        assert (parts == layers.bytes_stored).all()
    assert seen >= 12
    rows = result.rows
    assert rows.loc[["prune", "finetune"], "bytes_stored"].tolist() == [total, total]
    assert (
        rows.loc["initial", "bytes_stored"] == rows.loc["initial", "bytes"] == sum(v.nbytes for v in weights.values())
    )
    assert rows.loc["prune", "compression_bytes"] == pytest.approx(rows.loc["initial", "bytes"] / total)
    again = prune(*NET, f"granularity={granularity}", *keys, "stages=[prune,finetune]", "finetune.batch_size=8")
    assert again.err.count("taken from the store") == 3
    assert (again.folder / "layers.csv").read_bytes() == (result.folder / "layers.csv").read_bytes()


def test_a_resumed_stage_knows_the_form_of_masks_it_chose_before(prune, monkeypatch):
    from prune_cli.training import fit as loop

    command = (
        *NET[:-1], "granularity=n_m", "granularity.ratio=0.5", "schedule=iterative", "schedule.epochs=2",
        "schedule.retrain_epoch=1", "schedule.prune_freq=1", "stages=[prune]", "prune.batch_size=32", "limit_batches=4",
    )  # fmt: skip
    original, calls = loop.fit, []

    def interrupting(*arguments, **options):
        calls.append(0)
        count = iter(range(1, 1000))
        stop = (lambda: next(count) >= 2) if len(calls) == 2 else (lambda: False)
        return original(*arguments, **options | {"stop": stop})

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", interrupting)
        assert prune(*command).code == 75
    result = prune(*command)
    assert result.code == 0 and "going on from epoch 2" in result.err
    layers = pandas.read_csv(result.folder / "layers.csv").query("stage == 'prune' and kind in ['Conv2d', 'Linear']")
    assert set(layers.format) == {"n_m"}


def test_masks_that_surgery_cut_across_are_single_weights_and_others_keep_their_form(prune):
    result = prune(
        *NET, "granularity=n_m", "granularity.ratio=0.5", "stages=[prune,second]", "+stage@second=prune",
        "+granularity@second.granularity=filter", "~second.granularity.units.m", "second.granularity.ratio=0.375",
        "second.granularity.dependency=inner_only",
    )  # fmt: skip
    assert result.code == 0, result.err
    layers = pandas.read_csv(result.folder / "layers.csv").query("stage == 'second'").set_index("layer")
    assert layers.loc["layer1.0.conv1", "weight_shape"] == "5x8x3x3"  # fewer outputs: groups of inputs as before
    assert layers.loc["layer1.0.conv1", "format"] == "n_m"
    assert layers.loc["layer1.0.conv2", "weight_shape"] == "8x5x3x3"
    assert layers.loc["layer1.0.conv2", "format"] == "element"
    mask = read_state_dict(result.folder / "second/masks.safetensors")["layer1.0.conv2.weight"].bool()
    assert layers.loc["layer1.0.conv2", "bytes_stored"] == single(mask)
