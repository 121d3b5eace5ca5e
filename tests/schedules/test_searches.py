"""Searches: the budget is met, what is better wins, and what cannot be is said; on problems whose answer is known."""

from __future__ import annotations

import functools
import importlib.util
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_cli.errors import ScheduleError
from prune_cli.schedules.amc import amc
from prune_cli.schedules.auto_compress import auto_compress
from prune_cli.schedules.backward import backward
from prune_cli.schedules.choices import scaled
from prune_cli.schedules.ddpg import Agent, Transition
from prune_cli.schedules.netadapt import netadapt
from prune_cli.schedules.optuna_search import optuna_search
from prune_cli.schedules.requests import ACCEPTED, Evaluate, Judge, Mask, Project, Restore, Train
from prune_cli.schedules.schedule import first_request
from prune_cli.schedules.sensitivity import sensitivity
from prune_cli.schedules.simulated_annealing import accepted, simulated_annealing
from tests.schedules.played import play, toy

TWO = toy({"dear": 20, "cheap": 20}, {"dear": 3, "cheap": 1}, 0.5)


def accuracy(kept) -> float:
    """The cheap layer matters much more: best is to keep it and to cut the dear one."""
    return 90 * (kept["cheap"] / 20) ** 2 + 10 * (kept["dear"] / 20)


BEST = {"dear": 6, "cheap": 20}  # 38 of the 40 multiply-adds that may remain; 7 would be 41
SEARCHES = {
    "netadapt": functools.partial(netadapt, step=0.1, short_epochs=0),
    "simulated_annealing": functools.partial(simulated_annealing, candidates=150),
    "amc": functools.partial(amc, episodes=150, warmup=50, least=0.1),
    "sensitivity": functools.partial(sensitivity, grid=(0.25, 0.5, 0.75), delta=5.0),
    "auto_compress": functools.partial(auto_compress, rounds=1, candidates=150),
    "optuna": functools.partial(optuna_search, candidates=60),
}


def outcome(requests, problem):
    """What a search keeps in the end."""
    masks = [one for one in requests if isinstance(one, Mask)]
    if masks:
        return masks[-1].kept
    last = [one for one in requests if isinstance(one, Evaluate)][-1]
    return max((kept for kept in last.candidates if problem.cost(kept) <= last.within), key=accuracy)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_meets_the_budget_and_beats_equal_ratios(name):
    kept = outcome(play(SEARCHES[name], TWO, accuracy), TWO)
    assert TWO.cost(kept) <= TWO.budget
    assert accuracy(kept) > accuracy({"dear": 10, "cheap": 10}) + 20


@pytest.mark.parametrize("name", ["netadapt", "simulated_annealing", "auto_compress", "optuna"])
def test_a_search_comes_within_a_point_or_two_of_the_best(name):
    assert accuracy(outcome(play(SEARCHES[name], TWO, accuracy), TWO)) >= accuracy(BEST) - 6


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_the_same_every_time_and_another_with_another_seed(name):
    first, again = (play(SEARCHES[name], TWO, accuracy) for _ in range(2))
    assert first == again
    if name in ("simulated_annealing", "amc", "optuna"):
        other = toy({"dear": 20, "cheap": 20}, {"dear": 3, "cheap": 1}, 0.5, seed=1)
        assert play(SEARCHES[name], other, accuracy) != first


@pytest.mark.parametrize("name", [*SEARCHES, "backward"])
def test_units_that_cannot_be_counted_are_refused_when_it_is_first_asked(name):
    search = SEARCHES.get(name) or functools.partial(backward, epochs=0)
    with pytest.raises(ScheduleError, match=f"schedule={name} says how many units.*choose granularity=filter"):
        first_request(search, toy({"a": 4}, {"a": 1}, 0.5, countable=False))


@pytest.mark.parametrize("name", SEARCHES)
def test_a_budget_below_the_floors_ends_in_one_line(name):
    with pytest.raises(ScheduleError, match="budget") as caught:
        play(SEARCHES[name], toy({"a": 4, "b": 4}, {"a": 1, "b": 1}, 0.3, fixed=1000), lambda kept: 50.0)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ choices


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.5, 20), st.floats(0, 1)), min_size=1, max_size=5),
    st.floats(0.2, 1),
)
def test_scaled_is_within_what_is_allowed_and_no_larger_part_of_the_line_is(layers, remains):
    names = [str(index) for index in range(len(layers))]
    units = {name: size for name, (size, _, _) in zip(names, layers, strict=True)}
    each = {name: cost for name, (_, cost, _) in zip(names, layers, strict=True)}
    problem = toy(units, each, remains)
    goal = np.array([part for *_, part in layers])
    try:
        kept = scaled(problem, goal)
    except ScheduleError:
        assert problem.cost(dict.fromkeys(names, 1)) > problem.budget
        return
    assert problem.cost(kept) <= problem.budget + 1e-6
    assert all(1 <= kept[name] <= units[name] for name in names)
    if kept != problem.whole:  # everything one unit larger would be beyond it
        more = {name: min(kept[name] + 1, units[name]) for name in names}
        assert problem.cost(more) > problem.budget - 1e-6


def test_scaled_keeps_proportions_where_no_floor_stops_it():
    problem = toy({"a": 1000, "b": 1000}, {"a": 1, "b": 1}, 0.7)
    kept = scaled(problem, np.array([0.0, 0.5]))
    assert 1000 - kept["a"] == pytest.approx(2 * (1000 - kept["b"]), abs=3) and sum(kept.values()) in range(1390, 1401)


# ------------------------------------------------------------------------------------------------- each algorithm


def test_netadapt_always_advances_and_its_last_step_is_cut_short():
    rounds = [one for one in play(SEARCHES["netadapt"], TWO, accuracy) if isinstance(one, Evaluate)]
    costs = [max(cost for kept in one.candidates if (cost := TWO.cost(kept)) <= one.within) for one in rounds]
    assert all(after < before for before, after in pairwise([80, *costs])) and costs[-1] <= 40
    assert all(one.adopt for one in rounds)
    assert max(before - after for before, after in pairwise([80, *costs])) <= 8 + 3  # a step, and a unit of the dear


def test_netadapt_halves_a_step_that_nobody_can_give():
    kept = outcome(play(functools.partial(netadapt, step=0.9, short_epochs=0), TWO, accuracy), TWO)
    assert TWO.cost(kept) <= TWO.budget


def test_netadapt_says_that_its_steps_never_add_up():
    with pytest.raises(ScheduleError, match=r"add up to 0\.1 at most, but 0\.5 of the macs have to go"):
        first_request(functools.partial(netadapt, step=0.05, decay=0.5), TWO)


@pytest.mark.parametrize(("gain", "temperature"), [(-5.0, 5.0), (-0.01, 0.02), (-3.0, 1.0), (0.0, 1e-9), (2.0, 1e-9)])
def test_annealing_takes_worse_candidates_as_often_as_its_temperature_says(gain, temperature):
    generator = np.random.default_rng(0)
    taken = sum(accepted(gain, temperature, generator) for _ in range(4000)) / 4000
    assert taken == pytest.approx(math.exp(min(gain, 0) / temperature), abs=0.03)


def test_annealing_ends_with_the_best_that_it_ever_saw():
    made = play(SEARCHES["simulated_annealing"], TWO, accuracy)
    seen = [one.candidates[0] for one in made if isinstance(one, Evaluate)]
    assert len(seen) == 150 and made[-1] == Mask(kept=max(seen, key=accuracy))


def test_sensitivity_takes_from_those_that_lose_least():
    made = play(functools.partial(sensitivity, grid=(0.25, 0.5, 0.75), delta=5.0, rounds=2, epochs=1), TWO, accuracy)
    masks = [one for one in made if isinstance(one, Mask)]
    assert [type(one) for one in made] == [Evaluate, Judge, Mask, Train] * 2
    assert TWO.cost(masks[0].kept) <= 80 * 0.5**0.5 and TWO.cost(masks[1].kept) <= 40
    assert all(masks[1].kept[name] <= masks[0].kept[name] for name in TWO.whole)
    assert masks[1].kept["cheap"] > masks[1].kept["dear"]


def test_sensitivity_beyond_what_is_safe_takes_no_group_further_than_others_that_lose_less():
    """The large layer is cheap: it may lose nine tenths, and with that it is done while the dear one has more to give."""
    problem = toy({"dear": 50, "large": 500}, {"dear": 100, "large": 1}, 0.3)

    def score(kept) -> float:
        return 90 - 20 * (1 - kept["dear"] / 50) - (0 if kept["large"] >= 50 else 80)

    (mask,) = [one for one in play(functools.partial(sensitivity), problem, score) if isinstance(one, Mask)]
    assert problem.cost(mask.kept) <= problem.budget and mask.kept["large"] >= 50 and mask.kept["dear"] >= 14


def test_backward_goes_from_the_last_layer_to_the_first_and_gives_back_what_cannot_recover():
    problem = toy({"first": 8, "middle": 8, "last": 8}, {"first": 1, "middle": 1, "last": 1}, 0.5)

    def brittle(kept) -> float:
        return 90 - (5 if kept["middle"] < 6 else 0)

    made = play(functools.partial(backward, epochs=1, delta=1.0, halvings=1), problem, brittle)
    masks = [one.kept for one in made if isinstance(one, Mask)]
    assert masks == [
        {"first": 8, "middle": 8, "last": 4}, {"first": 8, "middle": 4, "last": 4}, {"first": 8, "middle": 6, "last": 4},
        {"first": 4, "middle": 6, "last": 4},
    ]  # fmt: skip
    assert [one for one in made if isinstance(one, Restore)] == [Restore("before", masks=True)]
    order = play(functools.partial(backward, epochs=0, order="forward"), problem, lambda kept: 90.0)
    assert [one.kept["first"] for one in order if isinstance(one, Mask)] == [4, 4, 4]
    together = play(functools.partial(backward, epochs=2, order="all_at_once"), problem, brittle)
    assert [one for one in together if isinstance(one, Mask | Train)] == [
        Mask(kept=dict.fromkeys(problem.whole, 4)), Train(2),
    ]  # fmt: skip


def test_backward_by_sensitivity_begins_with_what_loses_least():
    made = play(functools.partial(backward, epochs=0, order="sensitivity", delta=100), TWO, accuracy)
    masks = [one.kept for one in made if isinstance(one, Mask)]
    assert masks[0]["dear"] == 10 and masks[0]["cheap"] == 20


def test_auto_compress_takes_equal_shares_and_projects_onto_what_annealing_found():
    made = play(
        functools.partial(auto_compress, rounds=2, candidates=20, iterations=2, rho=0.1, rho_growth=2.0), TWO, accuracy
    )
    masks = [one for one in made if isinstance(one, Mask)]
    assert TWO.cost(masks[0].kept) <= 80 * 0.5**0.5 and TWO.cost(masks[1].kept) <= 40
    assert TWO.cost(masks[0].kept) > 80 * 0.5**0.5 - 4
    projections = [one for one in made if isinstance(one, Project)]
    assert [one.rho for one in projections] == [0.1, 0.2, 0.2] * 2
    assert [one.kept for one in projections] == [masks[0].kept] * 3 + [masks[1].kept] * 3


def test_auto_compress_that_only_masks_chooses_from_what_it_left():
    made = play(functools.partial(auto_compress, rounds=2, candidates=20, iterations=1), TWO, accuracy)
    first, second = (one.kept for one in made if isinstance(one, Mask))
    assert all(second[name] <= first[name] for name in first)
    before = next(number for number, one in enumerate(made) if isinstance(one, Mask))
    later = [one for one in made[before:] if isinstance(one, Evaluate)]
    assert later and all(kept[name] <= first[name] for one in later for kept in one.candidates for name in first)


@pytest.mark.parametrize("seed", range(3))
def test_amc_meets_the_budget_in_every_episode(seed):
    problem = toy({"a": 16, "b": 8, "c": 32}, {"a": 5, "b": 2, "c": 1}, 0.4, seed=seed)
    made = play(functools.partial(amc, episodes=40, warmup=20, least=0.1), problem, lambda kept: 50.0)
    costs = [problem.cost(one.candidates[0]) for one in made if isinstance(one, Evaluate)]
    assert len(costs) == 40 and max(costs) <= problem.budget
    assert max(costs) > 0.9 * problem.budget


def test_amc_without_a_budget_weighs_the_cost():
    made = play(functools.partial(amc, episodes=80, warmup=40, reward="accuracy_and_cost"), TWO, lambda kept: 90.0)
    assert TWO.cost(made[-1].kept) < 0.4 * TWO.cost(TWO.whole)


def test_ddpg_learns_a_split_whose_best_is_known():
    """Two decisions of one episode; the reward is highest at (0.8, 0.2), whatever the state says."""
    agent = Agent(2, np.random.default_rng(0), memory=400, decay=0.97)
    states = [np.array([0.0, 1.0]), np.array([1.0, 0.0])]
    for episode in range(300):
        explores = episode < 60
        actions = [agent.explore(0, 1) if explores else agent.act(state, 0, 1) for state in states]
        reward = -((actions[0] - 0.8) ** 2) - (actions[1] - 0.2) ** 2
        made = [Transition(states[0], actions[0], reward, states[1]), Transition(states[1], actions[1], reward, None)]
        (agent.remember if explores else agent.learn)(made)
    found = [agent.act(state, 0, 1, noise=False) for state in states]
    assert found[0] > 0.65 and found[1] < 0.35


def test_amc_needs_episodes_to_learn_in():
    with pytest.raises(ScheduleError, match="warmup=5 leaves none of episodes=5"):
        first_request(functools.partial(amc, episodes=5, warmup=5), TWO)


# --------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("name", [*(name for name in SEARCHES if name != "netadapt"), "backward"])
def test_a_search_says_of_every_candidate_what_became_of_it(name):
    search = SEARCHES.get(name) or functools.partial(backward, epochs=0, delta=1.0, halvings=1)
    made = play(search, TWO, accuracy)
    for request, after in pairwise(made):
        if isinstance(request, Evaluate):
            assert isinstance(after, Judge) and len(after.verdicts) == len(request.candidates)
    said = [verdict for one in made if isinstance(one, Judge) for verdict in one.verdicts]
    assert ACCEPTED in said and len(set(said)) > 1 and all(said)


def test_netadapt_names_the_groups_that_cannot_give_as_much():
    problem = toy({"much": 40, "little": 2}, {"much": 1, "little": 1}, 0.5)
    made = play(functools.partial(netadapt, step=0.2, short_epochs=0), problem, lambda kept: 50.0 + kept["little"])
    for one in (one for one in made if isinstance(one, Evaluate)):
        gave = [problem.cost(kept) <= one.within for kept in one.candidates]
        assert len(one.candidates) == 2 and gave == [True, False]


# ----------------------------------------------------------------------------------------------------------- Optuna

SIX = toy(dict.fromkeys("abcdef", 16), {"a": 4, "b": 2, "c": 1, "d": 1, "e": 2, "f": 4}, 0.5)
WORTH = {"a": 1, "b": 1, "c": 9, "d": 9, "e": 1, "f": 1}


def worth(kept) -> float:
    """The cheap layers in the middle are worth most: best is to keep them whole, and 68 of the rest."""
    return sum(WORTH[name] * (1 - (1 - count / 16) ** 2) for name, count in kept.items()) * 100 / sum(WORTH.values())


def found(sampler: str, seed: int, **keys) -> float:
    problem = toy(dict.fromkeys("abcdef", 16), {"a": 4, "b": 2, "c": 1, "d": 1, "e": 2, "f": 4}, 0.5, seed=seed)
    made = play(functools.partial(optuna_search, candidates=80, sampler=sampler, **keys), problem, worth)
    (mask,) = [one for one in made if isinstance(one, Mask)]
    assert problem.cost(mask.kept) <= problem.budget
    return worth(mask.kept)


def test_samplers_that_learn_find_more_than_random_ones():
    at_random = np.mean([found("random", seed) for seed in range(3)])
    for sampler in ("tpe", "cma_es"):
        assert np.mean([found(sampler, seed) for seed in range(3)]) > at_random + 0.2, sampler
    equal = ({"a": a, "b": b, "c": 16, "d": 16, "e": b, "f": a} for a in range(1, 17) for b in range(1, 17))
    best = max(worth(kept) for kept in equal if SIX.cost(kept) <= SIX.budget)
    assert best - 1 < max(found("cma_es", seed) for seed in range(3)) < best + 0.5


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_with_two_objectives_costs_differ_and_the_best_within_the_budget_is_removed(sampler):
    search = functools.partial(
        optuna_search, candidates=40, sampler=sampler, objectives=("score", "cost"), population=8
    )
    made = play(search, SIX, worth)
    assert made == play(search, SIX, worth)
    tried = [one.candidates[0] for one in made if isinstance(one, Evaluate)]
    costs = [SIX.cost(kept) for kept in tried]
    assert min(costs) < 0.9 * SIX.budget and max(costs) > 1.3 * SIX.budget
    assert SIX.cost(tried[0]) <= SIX.budget  # the same fraction of every group
    within = [kept for kept in tried if SIX.cost(kept) <= SIX.budget]
    assert made[-1] == Mask(kept=max(within, key=worth))
    verdicts = [one.verdicts[0] for one in made if isinstance(one, Judge)]
    for index, kept in enumerate(tried):
        beaten = any(worth(o) >= worth(kept) and SIX.cost(o) <= SIX.cost(kept) for o in tried[:index])
        assert (verdicts[index] == ACCEPTED) is not beaten


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"objectives": ("cost",)}, r"give \[score\] or \[score,cost\]"),
        ({"objectives": ("score", "score")}, "objectives"),
        ({"objectives": ("score", "cost"), "sampler": "cma_es"}, "choose tpe or nsga2"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_before_anything_runs(keys, word):
    with pytest.raises(ScheduleError, match=word):
        first_request(functools.partial(optuna_search, **keys), TWO)


@pytest.mark.parametrize(("missing", "sampler"), [("optuna", "tpe"), ("cmaes", "cma_es")])
def test_a_missing_package_is_one_line_that_names_the_extra(missing, sampler, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ScheduleError, match=rf"needs the package {missing}: pip install 'prune-cli\[search\]'"):
        first_request(functools.partial(optuna_search, sampler=sampler), TWO)
