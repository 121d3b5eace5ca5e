"""Bytes of formats by hand-computed numbers."""

from __future__ import annotations

import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.compression import gaps
from prune_cli.compression.gaps import fillers
from prune_cli.files.weights import read_state_dict
from prune_cli.granularities.n_m import nm_mask
from prune_cli.measure import storage
from prune_cli.measure.storage import MaskFormat


def test_dense_and_filters():
    assert storage.dense((4, 3, 3, 3)).total == 4 * 27 * 4
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    mask[0], mask[:, 1] = False, False
    cost = storage.filters(mask, (4, 3, 3, 3))
    assert (cost.values, cost.bitmaps) == (3 * 2 * 9 * 4, 1)


def test_fillers_cover_every_zero_that_codes_do_not():
    mask = torch.zeros(50, dtype=torch.bool)
    mask[[3, 20, 21]] = True
    # runs of 3, 16, 0 and 28 zeros; a filler of 2 bits covers 4, of 4 bits 16
    assert gaps.fillers(mask, 2) == 0 + 4 + 0 + 7
    assert gaps.fillers(mask, 4) == 0 + 1 + 0 + 1
    assert gaps.fillers(torch.zeros(16, dtype=torch.bool), 4) == 1
    assert gaps.fillers(torch.ones(5, dtype=torch.bool), 4) == 0


def test_single_weights_take_the_cheapest_indices():
    full = torch.ones(100, 10, dtype=torch.bool)
    assert storage.element(full, full.shape) == storage.Storage(4000, bitmaps=125)
    sparse = torch.zeros(100, 100, dtype=torch.bool)
    sparse[:, 0] = True  # runs of 99 zeros: 8 bits need no filler, and one bit each is dearer
    assert storage.element(sparse, sparse.shape) == storage.Storage(400, indices=100)


# ------------------------------------------------------------------------------------------------ which format


def random_mask(seed: int, *shape: int, density: float) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


N_M = MaskFormat("n_m", {"m": 4, "n": 2, "axis": 1})


def test_a_mask_is_stored_in_its_form_while_it_has_it():
    keep = nm_mask(torch.randn(8, 16, 3, 3), 4, 2)
    name, cost = storage.stored(N_M, keep, keep.shape)
    assert (name, cost.values, cost.indices, cost.total) == ("n_m", 8 * 8 * 9 * 4, 8 * 8 * 9 * 2 // 8, 2448)
    across = keep[:, [0, 1, 4, 5, 8, 9, 12, 13]]  # half the input channels gone: groups of four are other channels now
    assert bool((across.view(8, 2, 4, 3, 3).sum(2) > 2).any())
    name, cost = storage.stored(N_M, across, across.shape)
    assert (name, cost) == ("element", storage.element(across, across.shape))
    # Transposed weights have their input channels in front.
    turned = keep.transpose(0, 1)
    assert storage.stored(MaskFormat("n_m", {"m": 4, "n": 2, "axis": 0}), turned, turned.shape)[0] == "n_m"


def test_zeros_inside_a_form_are_stored_as_values_only_where_that_is_less():
    dead = nm_mask(torch.randn(8, 16), 4, 2)
    dead[0] = False  # 8 of 128 weights fewer than 2:4 holds: dearer than bits that say so
    assert storage.stored(N_M, dead, dead.shape) == ("element", storage.element(dead, dead.shape))
    one = nm_mask(torch.randn(64, 64), 8, 1)
    one[0, 0:8] = False  # here the format's 3 bits per weight are less than any other index
    name, cost = storage.stored(MaskFormat("n_m", {"m": 8, "n": 1, "axis": 1}), one, one.shape)
    assert (name, cost.values, cost.indices) == ("n_m", 64 * 8 * 4, 64 * 8 * 3 // 8)
    stripes = torch.ones(8, 16, 3, 3, dtype=torch.bool)
    stripes[:, :, 0] = False
    inside = stripes & random_mask(1, *stripes.shape, density=0.5)
    assert storage.stored(MaskFormat("stripe"), stripes, stripes.shape)[0] == "stripe"
    assert storage.stored(MaskFormat("stripe"), inside, inside.shape)[0] == "element"


def test_filters_that_were_masked_across_cost_their_zeros_or_less():
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    mask[1], mask[:, 2] = False, False
    assert storage.stored(MaskFormat("filters"), mask, mask.shape) == (
        "filters",
        storage.Storage(5 * 3 * 9 * 4, bitmaps=2),
    )
    mask[0, 0, 0, 0] = False
    name, cost = storage.stored(MaskFormat("filters"), mask, mask.shape)
    assert (name, cost.total) == ("filters", 542)  # one zero as a value is less than 216 bits
    norm = torch.tensor([True] * 5 + [False] * 27)
    assert storage.stored(MaskFormat("filters"), norm, norm.shape) == ("filters", storage.Storage(20, bitmaps=4))


def test_patterns_hold_parts_of_themselves_but_no_others():
    form = MaskFormat("pattern", {"entries": 4, "library": 2})
    mask = torch.zeros(4, 8, 3, 3, dtype=torch.bool)
    kernels = mask.view(32, 9)
    kernels[:10, [0, 1, 3, 4]] = True
    kernels[10:20, [4, 5, 7, 8]] = True
    name, cost = storage.stored(form, mask, mask.shape)
    assert (name, cost.values, cost.indices, cost.bitmaps, cost.codebooks) == ("pattern", 20 * 16, 3, 4, 3)
    kernels[0, 0] = False  # 3 of the pattern's 4
    assert storage.stored(form, mask, mask.shape)[0] == "pattern"
    kernels[20, [2, 4]] = True  # in neither
    assert storage.stored(form, mask, mask.shape)[0] == "element"
    kernels[20] = kernels[0] | kernels[10]  # five and more entries
    assert storage.stored(form, mask, mask.shape)[0] == "element"
    kernels[20] = False
    kernels[20, [0, 2, 4, 6]] = True  # a third pattern
    assert storage.stored(form, mask, mask.shape)[0] == "element"


@pytest.mark.parametrize("form", [MaskFormat(), N_M, MaskFormat("filters")])
def test_what_removes_next_to_nothing_is_dense(form):
    mask = torch.ones(16, 16, dtype=torch.bool)
    assert storage.stored(form, mask, mask.shape, bits=16) == ("dense", storage.Storage(512))
    mask[0, 0] = False
    assert storage.stored(form, mask, mask.shape)[0] == "dense"


@given(st.integers(0, 10**6), st.sampled_from(sorted(storage.FORMATS)), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_values_cover_what_is_kept_and_zeros_among_them_are_never_the_dearer_way(seed, name, density):
    numbers = {"n_m": {"m": 4, "n": 2, "axis": 1}, "pattern": {"entries": 4, "library": 8}}.get(name, {})
    mask = random_mask(seed, 4, 6, 3, 3, density=density)
    _, cost = storage.stored(MaskFormat(name, numbers), mask, mask.shape)
    needed = 4 * int(mask.sum())
    assert needed <= cost.values and cost.total <= 4 * mask.numel()
    if cost.values > needed:
        assert cost.total <= storage.element(mask, mask.shape).total


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
