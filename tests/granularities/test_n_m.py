"""N:M masks against brute force over all patterns, their padding, their ratios and what they refuse."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.n_m import NM, nm_mask, parse, surplus
from prune_cli.measure import storage
from prune_cli.measure.storage import MaskFormat
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule

L1 = Criterion(weights.l1)
IMAGE = torch.zeros(1, 3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 3), nn.Flatten(),
        nn.Linear(6 * 4, 10),
    )  # fmt: skip


def weight(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 11), st.sampled_from([(4, 2), (4, 1), (3, 2), (2, 1)]))
@settings(max_examples=60, deadline=None)
def test_every_group_keeps_the_best_choice_of_all(seed, rows, columns, pattern):
    m, n = pattern
    scores = weight(seed, rows, columns, 2, 1).abs()
    keep = nm_mask(scores, m, n)
    for row, position in itertools.product(range(rows), range(2)):
        for start in range(0, columns, m):
            group = scores[row, start : start + m, position, 0]
            kept = keep[row, start : start + m, position, 0]
            assert int(kept.sum()) == min(n, len(group))
            best = max(
                float(group[list(choice)].sum())
                for choice in itertools.combinations(range(len(group)), int(kept.sum()))
            )
            assert float(group[kept].sum()) == pytest.approx(best)
    assert int((~keep).sum()) == surplus(scores.shape, m, n)


def test_large_groups_sort_as_small_ones_compare():
    scores = weight(1, 5, 40, 3, 3).round(decimals=1)  # with ties
    blocks = scores.reshape(5, 2, 20, 3, 3)
    expected = torch.ones_like(blocks, dtype=torch.bool)
    expected.scatter_(2, torch.sort(blocks, dim=2, stable=True).indices[:, :, :13], False)
    assert torch.equal(nm_mask(scores, 20, 7), expected.reshape(scores.shape))
    few = nm_mask(scores[:, :16], 16, 3)
    order = torch.sort(scores[:, :16], dim=1, stable=True).indices[:, :13]
    assert torch.equal(few, torch.ones(5, 16, 3, 3, dtype=torch.bool).scatter(1, order, False))


def test_ties_remove_the_first():
    assert nm_mask(torch.ones(1, 6), 4, 1).tolist() == [[False, False, False, True, False, True]]


@pytest.mark.parametrize("columns", [3, 6])
def test_a_short_last_group_keeps_what_it_can(columns):
    keep = nm_mask(weight(2, 4, columns, 3, 3), 4, 2)
    assert keep[:, : columns // 4 * 4].sum() == 4 * 9 * 2 * (columns // 4)
    assert (keep[:, columns // 4 * 4 :].sum(1) == 2).all()


def test_network_masks_are_n_m_along_input_channels_and_depthwise_stays_dense():
    model = network()
    selection = select(Granularity(NM(), 0.5), L1, model, IMAGE)
    assert sorted(selection.masks) == ["0.weight", "3.weight", "5.weight"]
    for name, mask in selection.masks.items():
        assert torch.equal(mask, nm_mask(model.get_parameter(name).detach().abs(), 4, 2))
    assert selection.removed == sum(surplus(mask.shape, 4, 2) for mask in selection.masks.values())


def test_transposed_convolutions_group_their_input_axis():
    model = nn.Sequential(nn.ConvTranspose2d(8, 5, 3))
    (mask,) = select(Granularity(NM(), 0.75), L1, model, torch.zeros(1, 8, 4, 4)).masks.values()
    assert (mask.view(2, 4, 5, 3, 3).sum(1) == 1).all()
    grouped = nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=2))
    with pytest.raises(ConfigError, match="needs groups=1"):
        Granularity(NM(), 0.5).check(grouped, L1)


@given(st.integers(0, 20))
@settings(max_examples=21, deadline=None)
def test_a_share_removes_its_part_the_lowest_of_each_group_first(share):
    model = nn.Sequential(nn.Linear(32, 5))
    full = select(Granularity(NM(8), 0.75), L1, model, torch.zeros(1, 32)).masks["0.weight"]
    part = Fraction(share, 20)
    mask = select(Granularity(NM(8), 0.75), L1, model, torch.zeros(1, 32), fraction=part).masks["0.weight"]
    assert int((~mask).sum()) == int(part * 5 * 24)
    assert not (~mask & full).any()
    per_group = (~mask).view(5, 4, 8).sum(2)
    assert per_group.max() - per_group.min() <= 1


def test_what_is_masked_stays_masked():
    model = nn.Sequential(nn.Linear(32, 5))
    held = {"0.weight": nm_mask(weight(3, 5, 32), 4, 2)}
    mask = select(Granularity(NM(), 0.75), L1, model, torch.zeros(1, 32), masked=held).masks["0.weight"]
    assert not (mask & ~held["0.weight"]).any()
    assert (mask.view(5, 8, 4).sum(2) == 1).all()


def test_files_name_patterns_and_irregular_ratios(tmp_path):
    file = tmp_path / "ratios.yaml"
    file.write_text("prune_ratio: {0.weight: m2n1, 3.weight: m8n1, 5.weight: 0.3}")
    model = network()
    granularity = Granularity(NM(), ratio_file=file)
    granularity.check(model, L1)
    masks = select(granularity, L1, model, IMAGE).masks
    assert torch.equal(masks["3.weight"], nm_mask(model[3].weight.detach().abs(), 8, 1))
    assert torch.equal(masks["0.weight"], nm_mask(model[0].weight.detach().abs(), 2, 1))
    assert int((~masks["5.weight"]).sum()) == 240 * 3 // 10


def test_ratios_are_whole_parts_of_m():
    assert NM().patterns({"a": 0.25, "b": 0.75, "c": 0.0}) == {"a": (4, 3), "b": (4, 1)}
    assert NM(8).patterns({"a": 0.875}) == {"a": (8, 1)}
    with pytest.raises(ConfigError, match=r"removes 2.4 of m=4; choose one of 0.25, 0.5, 0.75"):
        Granularity(NM(), 0.6).check(network(), L1)
    with pytest.raises(ConfigError, match=r"removes 1\.2"):
        Granularity(NM(), 0.5, rules=(Rule(types=("default",)), Rule(names=("3",), ratio=0.3))).check(network(), L1)


@pytest.mark.parametrize("pattern", ["m4n5", "m4n0", "m0n0"])
def test_impossible_patterns_are_one_line(tmp_path, pattern):
    file = tmp_path / "ratios.yaml"
    file.write_text(f"prune_ratio: {{3.weight: {pattern}}}")
    with pytest.raises(ConfigError, match=r"3.weight: .* n must be from 1 to m") as caught:
        Granularity(NM(), ratio_file=file).check(network(), L1)
    assert "\n" not in str(caught.value)


def test_illegal_combinations():
    with pytest.raises(ConfigError, match="no N:M pattern"):
        parse("2:4", "x")
    with pytest.raises(ConfigError, match="choose criterion=l1"):
        Granularity(NM()).check(network(), Criterion(lambda view: view.weight.flatten(1).sum(1), level="channel"))
    with pytest.raises(ConfigError, match="choose scope=layer"):
        select(Granularity(NM(), 0.5, scope="global"), L1, network(), IMAGE)


def test_storage_of_2_of_4():
    keep = nm_mask(weight(4, 8, 16, 3, 3), 4, 2)
    cost = storage.n_m(keep, keep.shape, 4, 2, bits=16)
    groups = 8 * 4 * 9
    assert (cost.values, cost.indices) == (groups * 2 * 2, groups * 2 * 2 // 8)
    assert cost.total / (keep.numel() * 2) == 36 / 64
    short = nm_mask(weight(5, 2, 6), 4, 2)
    assert storage.n_m(short, short.shape, 4, 2).values == 2 * 4 * 4


def test_forms_know_patterns_axes_and_irregular_layers():
    model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ConvTranspose2d(4, 8, 3), nn.Conv2d(8, 8, 1))
    asked = {"0.weight": "m8n1", "1.weight": "m4n2", "2.weight": 0.5}
    assert NM().forms(model, asked) == {
        "0.weight": MaskFormat("n_m", {"m": 8, "n": 1, "axis": 1}),
        "1.weight": MaskFormat("n_m", {"m": 4, "n": 2, "axis": 0}),
    }
    assert NM().forms(model, {"2.weight": 0.75}) == {"2.weight": MaskFormat("n_m", {"m": 4, "n": 1, "axis": 1})}
