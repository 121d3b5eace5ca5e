"""How many go, and which: exact k of n in every scope, against brute force and formulas by hand."""

from __future__ import annotations

import functools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.element import Element
from prune_cli.granularities.units import Group
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.ranking import normalized
from prune_cli.selection.select import keep_units, select
from prune_cli.selection.targets import Rule, ratios
from prune_cli.structure.keep import removed

L1 = Criterion(weights.l1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 4, 10))


IMAGE = torch.zeros(1, 3, 8, 8)
choose = functools.partial(select, criterion=L1, example_inputs=IMAGE)


def groups(*sizes: int, ratio: float, ties: bool = False) -> list[Group]:
    generator = torch.Generator().manual_seed(sum(sizes))
    scores = [torch.rand(size, generator=generator) for size in sizes]
    return [
        Group(str(index), torch.ones_like(score) if ties else score, ratio, lambda keep: {})
        for index, score in enumerate(scores)
    ]


def test_ratios_are_exact_where_floats_are_not():
    assert int(0.57 * 100) == 56
    assert removed(0.57, 100) == 57
    assert removed(0.29, 100) == 29


@given(st.integers(1, 60), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_layer_scope_removes_exactly_k_of_n_also_with_ties(size, percent, ties):
    ratio = percent / 100
    (keep,) = keep_units(groups(size, ratio=ratio, ties=ties), Granularity(Element(), ratio), Fraction(1))
    assert int((~keep).sum()) == min(percent * size // 100, size - 1)
    if ties:
        assert keep.tolist() == sorted(keep.tolist())  # ties go by index, the first first


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 95), st.floats(0, 0.9), st.floats(0.1, 1))
@settings(max_examples=80, deadline=None)
def test_global_scope_is_the_best_choice_under_floors_and_caps(sizes, percent, min_keep, max_ratio):
    ratio = percent / 100
    granularity = Granularity(Element(), ratio, scope="global", min_keep=min_keep, max_ratio=max_ratio)
    made = groups(*sizes, ratio=ratio)
    keeps = keep_units(made, granularity, Fraction(1))
    caps = [max(0, min(n - max(1, int(Fraction(str(min_keep)) * n)), int(Fraction(str(max_ratio)) * n))) for n in sizes]
    gone = [int((~keep).sum()) for keep in keeps]
    assert all(count <= cap for count, cap in zip(gone, caps, strict=True))
    assert sum(gone) == min(int(Fraction(str(ratio)) * sum(sizes)), sum(caps))
    # Brute force: merge the removable ends of all groups and take the lowest.
    ends = sorted(
        float(score) for group, cap in zip(made, caps, strict=True) for score in group.scores.sort().values[:cap]
    )
    lost = sum(float(group.scores[~keep].sum()) for group, keep in zip(made, keeps, strict=True))
    assert lost == pytest.approx(sum(ends[: sum(gone)]), abs=1e-5)


def test_a_share_of_the_ratio_and_nothing_at_zero():
    model = network()
    assert choose(Granularity(Element(), 0.8), model=model, fraction=0.0).removed == 0
    half = choose(Granularity(Element(), 0.8), model=model, fraction=0.5)
    assert half.removed == sum(int(Fraction(4, 10) * layer.weight.numel()) for layer in (model[0], model[2], model[4]))
    assert choose(Granularity(Element(), 0.0), model=model).removed == 0


def test_element_masks_remove_the_smallest_weights():
    model = network()
    selection = choose(Granularity(Element(), 0.5), model=model)
    for name, mask in selection.masks.items():
        weight = model.get_parameter(name).detach().abs()
        assert weight[~mask].max() <= weight[mask].min()


def test_what_is_masked_stays_masked():
    model = network()
    first = choose(Granularity(Element(), 0.3), model=model)
    criterion = Criterion(weights.random)
    second = select(Granularity(Element(), 0.6), criterion, model, IMAGE, masked=first.masks, seed=7)
    assert all(not (second.masks[name] & ~mask).any() for name, mask in first.masks.items())


def test_random_scores_follow_the_seed_and_differ_between_layers():
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    image = torch.zeros(1, 9)
    draw = functools.partial(select, Granularity(Element(), 0.5), Criterion(weights.random), model, image)
    a, b, c = draw(seed=1).masks, draw(seed=1).masks, draw(seed=2).masks
    assert torch.equal(a["0.weight"], b["0.weight"])
    assert not torch.equal(a["0.weight"], c["0.weight"])
    assert not torch.equal(a["0.weight"], a["1.weight"])


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_lamp_by_its_formula(values):
    scores = torch.tensor(values, dtype=torch.double)
    expected = [
        value**2
        / sum(other**2 for index, other in enumerate(values) if other > value or (other == value and index >= own))
        for own, value in enumerate(values)
    ]
    got = normalized(scores, "lamp")
    assert got.tolist() == pytest.approx(expected)
    assert got.max() == pytest.approx(1)


def test_rules_last_match_wins_and_unmatched_layers_stay_dense():
    rules = (Rule(types=("Conv2d",)), Rule(names=("2",), ratio=0.9), Rule(names_re="0", exclude=True))
    assert ratios(network(), 0.4, rules, None) == {"2.weight": 0.9}
    assert ratios(network(), 0.4, (), None) == {"0.weight": 0.4, "2.weight": 0.4, "4.weight": 0.4}
    assert ratios(network(), 0.4, (Rule(types=("default",)),), None) == ratios(network(), 0.4, (), None)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(names=("3",)), "no layer '3'"),
        (Rule(types=("Conv2D",)), "no Conv2D; did you mean 'Conv2d'"),
        (Rule(names_re="x.*"), "matches no layer"),
        (Rule(names_re="("), "names_re"),
    ],
)
def test_rules_that_match_nothing_are_errors(rule, message):
    with pytest.raises(ConfigError, match=message):
        ratios(network(), 0.5, (rule,), None)


def test_ratio_files(tmp_path):
    file = tmp_path / "ratios.yaml"
    file.write_text("prune_ratio:\n  module.0.weight: 0.25\n  2.weight: m4n2\n")
    assert ratios(network(), 0.5, (), file) == {"0.weight": 0.25, "2.weight": "m4n2"}
    with pytest.raises(ConfigError, match="N:M pattern"):
        Granularity(Element(), ratio_file=file).check(network(), L1)
    for content, message in [
        ("prune_ratio: {5.weight: 0.1}", "no prunable parameter '5.weight'"),
        ("prune_ratio: {0.weight: 1.0}", "neither a ratio"),
        ("prune_ratio: {module.0.weight: 0.5, 0.weight: 0.7}", "0.weight is there twice"),
        ("prune_ratio: [1]", "needs a mapping"),
        ("{", "is no YAML of plain values"),
    ]:
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            ratios(network(), 0.5, (), file)
    with pytest.raises(ConfigError, match="not both"):
        ratios(network(), 0.5, (Rule(),), file)


def test_illegal_combinations_say_what_would_be_legal():
    channel = Criterion(lambda view: view.weight.flatten(1).norm(dim=1), level="channel")
    with pytest.raises(ConfigError, match="choose criterion=l1"):
        Granularity(Element()).check(network(), channel)
    with pytest.raises(ConfigError, match="needs scope=global"):
        Granularity(Element(), normalize="lamp").check(network(), L1)
    with pytest.raises(ConfigError, match="none has a ratio of its own"):
        Granularity(Element(), scope="global", rules=(Rule(types=("default",)), Rule(names=("2",), ratio=0.1))).check(
            network(), L1
        )
    with pytest.raises(ConfigError, match="contain nan"):
        select(Granularity(Element()), Criterion(lambda view: view.weight * float("nan")), network(), IMAGE)
