"""How many go and in which order: votes, caps by layer, rounding and the queue over the network, by brute force."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.granularities.units import Group, Vote
from prune_cli.selection.ranking import Limits, even, rank, smallest


def group(name: str, scores: list[float], ratio: float = 0.5, **more) -> Group:
    return Group(name, torch.tensor(scores), ratio, lambda keep: {}, **more)


def exact(ratio: float, share: Fraction, count: int) -> int:
    return int(Fraction(str(ratio)) * share * count)


@st.composite
def coupled(draw) -> tuple[list[Group], float]:
    """Groups whose units have channels in one to three layers, some with two channels per unit, ties included."""
    ratio = draw(st.integers(0, 99)) / 100
    groups = []
    for index in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 6))
        votes = []
        for member in range(draw(st.integers(1, 3))):
            units = list(range(size)) * draw(st.integers(1, 2))
            scores = draw(st.lists(st.integers(0, 5), min_size=len(units), max_size=len(units)))
            votes.append(
                Vote(f"{index}.{member}", torch.tensor(units), torch.tensor(scores, dtype=torch.double), ratio)
            )
        groups.append(group(str(index), [0.0] * size, ratio, votes=tuple(votes)))
    return groups, ratio


def unanimous(groups: list[Group], voted: set[tuple[str, int]]) -> list[set[int]]:
    """Per group the units of which every channel (layer, position) was voted out."""
    gone = []
    for one in groups:
        against = {unit: [] for unit in range(one.scores.numel())}
        for vote in one.votes:
            for position, unit in enumerate(vote.units.tolist()):
                against[unit].append((vote.layer, position) in voted)
        gone.append({unit for unit, votes in against.items() if all(votes)})
    return gone


@given(coupled(), st.sampled_from([Fraction(1), Fraction(1, 3)]))
@settings(max_examples=150, deadline=None)
def test_a_unit_goes_only_when_every_layer_votes_so(made, share):
    groups, ratio = made
    limits = Limits()
    voted = set()
    for one in groups:
        for vote in one.votes:
            order = sorted(range(len(vote.scores)), key=lambda position, vote=vote: float(vote.scores[position]))
            voted |= {(vote.layer, position) for position in order[: exact(ratio, share, len(order))]}
    ranking = rank(groups, "layer", "none", limits)
    for keep, gone, most in zip(
        ranking.keep(ranking.counts(share)), unanimous(groups, voted), smallest(groups, limits), strict=True
    ):
        chosen = set((~keep).nonzero().flatten().tolist())
        assert chosen <= gone
        assert len(chosen) == min(len(gone), most)  # the floor gives a unit back


@given(coupled())
@settings(max_examples=150, deadline=None)
def test_votes_over_the_whole_network_have_one_threshold_for_all_channels(made):
    groups, ratio = made
    channels = [
        (float(score), vote.layer, position)
        for one in groups
        for vote in one.votes
        for position, score in enumerate(vote.scores)
    ]
    lowest = sorted(channels, key=lambda channel: channel[0])[: exact(ratio, Fraction(1), len(channels))]
    gone = unanimous(groups, {(layer, position) for _, layer, position in lowest})
    ranking = rank(groups, "global", "none", Limits())
    for keep, expected in zip(ranking.keep(ranking.counts(Fraction(1))), gone, strict=True):
        chosen = set((~keep).nonzero().flatten().tolist())
        assert chosen <= expected
        assert len(chosen) == min(len(expected), keep.numel() - 1)


@given(coupled(), st.sampled_from(["layer", "global"]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_counts_never_fall_as_the_share_grows_and_steps_tell_all_apart(made, scope, voting):
    groups, _ = made
    groups = even(groups if voting else [group(one.name, one.votes[0].scores.tolist()) for one in groups])
    ranking = rank(groups, scope, "none", Limits())
    previous = [0] * len(groups)
    for step in range(ranking.steps + 1):
        counts = ranking.counts(Fraction(step, ranking.steps))
        grown = [now - before for now, before in zip(counts, previous, strict=True)]
        assert all(0 <= more <= 1 for more in grown) or voting
        assert min(grown) >= 0
        assert scope == "layer" or sum(grown) <= 1
        previous = counts
    assert previous == smallest(groups, Limits())


@given(st.integers(1, 70), st.integers(0, 99), st.integers(1, 16), st.floats(0, 0.9), st.floats(0.05, 1))
@settings(max_examples=150, deadline=None)
def test_what_stays_is_a_multiple_or_everything_and_never_less_than_asked(size, percent, multiple, min_keep, max_ratio):
    limits = Limits(min_keep, max_ratio, multiple)
    ranking = rank([group("a", list(range(size)), percent / 100)], "layer", "none", limits)
    (gone,) = ranking.counts(Fraction(1))
    floor = max(1, exact(min_keep, Fraction(1), size))
    plain = max(0, min(percent * size // 100, size - floor, exact(max_ratio, Fraction(1), size)))
    kept = size - gone
    assert kept % multiple == 0 or kept == size
    assert size - plain <= kept < size - plain + multiple
    assert size >= multiple or kept == size


def test_the_largest_ratio_of_single_layers_binds_in_both_scopes():
    groups = [group("a.weight", [1.0, 2, 3, 4], 0.75), group("b", [5.0, 6, 7, 8], 0.75, layers=("b", "c"))]
    limits = Limits(max_ratio={"a": 0.25, "c": 0.5, "other": 0.1})
    for scope in ("layer", "global"):
        ranking = rank(groups, scope, "none", limits)
        assert ranking.counts(Fraction(1)) == [1, 2]
        assert ranking.bound(Fraction(1)) == ["a.weight", "b"]
        assert rank(groups, scope, "none", Limits()).bound(Fraction(1, 3)) == []


def test_floors_are_named_where_they_acted_only():
    groups = [group("low", [0.1, 0.2, 0.3]), group("high", [5.0, 6, 7])]
    ranking = rank(groups, "global", "none", Limits())
    assert ranking.counts(Fraction(1)) == [2, 1]
    assert ranking.bound(Fraction(1)) == ["low"]
    assert ranking.bound(Fraction(1, 2)) == []


def test_ranking_can_stop_before_the_first_layer_would_be_emptied():
    groups = [group("low", [0.1, 0.2, 0.3], 0.9), group("high", [0.25, 6, 7], 0.9)]
    assert rank(groups, "global", "none", Limits()).counts(Fraction(1)) == [2, 2]
    assert rank(groups, "global", "none", Limits(), never_empty=True).counts(Fraction(1)) == [2, 1]


def test_votes_compare_scores_that_are_normalised_by_layer():
    def groups(factor: float) -> list[Group]:
        scores = torch.tensor([1.0, 2, 3, 4], dtype=torch.double)
        units = torch.arange(4)
        both = (Vote("a", units, scores, 0.5), Vote("b", units, factor * scores, 0.5))
        return [group("a", [0.0] * 4, votes=both)]

    for how in ("layer_mean", "layer_l2", "lamp"):
        assert rank(groups(100), "global", how, Limits()).counts(Fraction(1)) == [2]
    assert rank(groups(100), "global", "none", Limits()).counts(Fraction(1)) == [0]
    assert rank(groups(1), "global", "none", Limits()).counts(Fraction(1)) == [2]


def test_layers_with_ratios_of_their_own_vote_by_them():
    units = torch.arange(4)
    scores = torch.tensor([1.0, 2, 3, 4])
    made = group("a", [0.0] * 4, votes=(Vote("a", units, scores, 0.75), Vote("b", units, scores.flip(0), 0.5)))
    ranking = rank([made], "layer", "none", Limits())
    (keep,) = ranking.keep(ranking.counts(Fraction(1)))
    assert keep.tolist() == [True, True, False, True]  # a votes 0, 1, 2 out and b votes 3, 2 out


def test_a_ratio_over_one_is_never_asked_by_even_groups():
    groups = [group("a", [1.0, 2, 3], 0.3)]
    assert [one.ratio for one in even(groups)] == [1.0]
    assert rank(even(groups), "layer", "none", Limits()).counts(Fraction(1)) == [2]
    assert rank([], "global", "none", Limits()).counts(Fraction(1)) == []


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masked_units_go_first_also_in_votes(scope):
    inf = float("-inf")
    votes = (Vote("a", torch.arange(3), torch.tensor([5.0, inf, 1.0]), 0.4),)
    ranking = rank([group("a", [5.0, inf, 1.0], 0.4, votes=votes)], scope, "none", Limits())
    (keep,) = ranking.keep(ranking.counts(Fraction(1)))
    assert keep.tolist() == [True, False, True]
