"""What a search leaves: every candidate as the journal has it, the front of the best, and what can be made of a row."""

from __future__ import annotations

import csv
import functools
import importlib.util
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_cli.config.locations import options
from prune_cli.errors import ScheduleError
from prune_cli.files import artifacts
from prune_cli.granularities.filter import Filter
from prune_cli.schedules.amc import amc
from prune_cli.schedules.chosen import chosen
from prune_cli.schedules.netadapt import netadapt
from prune_cli.schedules.one_shot import one_shot
from prune_cli.schedules.optuna_search import optuna_search
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Evaluate, Leave
from prune_cli.schedules.sensitivity import sensitivity
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.session.course import _decoded
from prune_cli.session.journal import Journal
from prune_cli.session.search_table import Tried, front
from tests.session.tiny import Cut, begin, journal, option, result, run, timeless

HALF = Granularity(Filter(), budget=Budget(macs=0.5), scope="layer")
UNLIKE = Granularity(Filter(), 0.7, scope="layer", max_ratio={"0": 0.25, "3": 0.75})  # one layer can give more
SEARCHES = [name for name in options("schedule") if name in (
    "amc", "auto_compress", "backward", "netadapt", "optuna", "sensitivity", "simulated_annealing",
)]  # fmt: skip


def table(state, name=artifacts.SEARCH) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(state.outcome.files[name])))


def asked(schedule, place) -> list[tuple[Problem, Evaluate, list, dict]]:
    """The requests that looked at candidates, with problem, answer and seconds, replayed from the journal alone."""
    record = journal(place)
    problem = Problem.from_dict(record.problem)
    asking, found = schedule(problem), []
    request = next(asking)
    for (_, answer), spent in zip(record.answers, record.spent, strict=True):
        heard = _decoded(answer)
        if isinstance(request, Evaluate):
            found.append((problem, request, heard, spent))
        problem = heard if isinstance(heard, Problem) else problem
        try:
            request = asking.send(heard)
        except StopIteration:
            break
    return found


@pytest.mark.parametrize("name", SEARCHES)
def test_the_table_is_what_the_journal_says(name, tmp_path):
    schedule = option("schedule", name)
    rows = iter(table(run(begin(tmp_path), schedule, HALF)))
    number = 0
    for turn, (problem, request, scores, spent) in enumerate(asked(schedule, tmp_path), 1):
        for index, (kept, score) in enumerate(zip(request.candidates, scores, strict=True)):
            row, number = next(rows), number + 1
            assert (row["round"], row["candidate"]) == (str(turn), str(number))
            assert {key: row[f"kept:{key}"] for key in problem.whole} == {
                key: str(count) for key, count in {**problem.whole, **kept}.items()
            }
            assert float(row["macs"]) == problem.cost(kept, "macs")
            assert float(row["params"]) == problem.cost(kept, "params")
            assert row["score"] == ("" if score is None else str(score))
            assert row["seconds"] == (str(spent[index]) if spent.get(index) else "")
            assert row["verdict"]
    assert next(rows, None) is None and number


@pytest.mark.parametrize("name", SEARCHES)
def test_killed_between_candidates_the_table_is_that_of_an_uncut_run(name, tmp_path, monkeypatch):
    schedule = option("schedule", name)
    wanted = run(begin(tmp_path / "calm"), schedule, HALF)
    parts = sum(len(spent) for *_, spent in asked(schedule, tmp_path / "calm"))
    for last in range(1, parts + 1, max(parts // 3, 1)):
        place, count, part = tmp_path / str(last), 0, Journal.part

        def die(self, *arguments, last=last, part=part):
            nonlocal count
            part(self, *arguments)
            count += 1
            if count == last:
                raise Cut

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "part", die)
            with pytest.raises(Cut):
                run(begin(place), schedule, HALF)
        before = [line for line in Journal(place, begin(place).world)._lines.read() if "part" in line]
        after = run(begin(place), schedule, HALF)
        assert result(after) == result(wanted)
        seconds = [row["seconds"] for row in table(after) if row["score"]]
        assert seconds[: len(before)] == [str(line["seconds"]) if line["seconds"] else "" for line in before]


def test_what_costs_too_much_is_in_the_table_with_the_reason(tmp_path):
    rows = table(run(begin(tmp_path), functools.partial(netadapt, step=0.3, short_epochs=0), UNLIKE))
    refused = [row for row in rows if not row["score"]]
    assert refused and all("more than the" in row["verdict"] and not row["seconds"] for row in refused)
    for turn in {row["round"] for row in rows}:
        mine = [row for row in rows if row["round"] == turn and row["score"]]
        (taken,) = [row for row in mine if row["verdict"] == "accepted"]
        assert float(taken["score"]) == max(float(row["score"]) for row in mine)
        others = {row["verdict"] for row in mine if row is not taken}
        assert others <= {f"candidate {taken['candidate']} is better"}


def test_a_schedule_that_tries_nothing_leaves_no_table(tmp_path):
    assert not {artifacts.SEARCH, artifacts.FRONT} & set(run(begin(tmp_path), one_shot, HALF).outcome.files)


def test_without_matplotlib_there_is_the_table_and_no_plot(tmp_path, monkeypatch):
    schedule = functools.partial(sensitivity, grid=(0.5,))
    first, again = (run(begin(tmp_path / place), schedule, HALF, plots=True).outcome.files for place in "ab")
    assert (
        first[artifacts.SEARCH_PLOT].startswith("<?xml")
        and first[artifacts.SEARCH_PLOT] == again[artifacts.SEARCH_PLOT]
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    files = run(begin(tmp_path / "c"), schedule, HALF).outcome.files
    assert artifacts.SEARCH in files and artifacts.SEARCH_PLOT not in files


# ------------------------------------------------------------------------------------------------------- the front


@given(st.lists(st.tuples(st.integers(0, 8), st.one_of(st.none(), st.integers(0, 8))), max_size=20))
def test_the_front_is_what_no_other_beats(points):
    rows = [Tried(1, number, {"macs": cost}, score, None, "", {}) for number, (cost, score) in enumerate(points)]

    def beats(one, other) -> bool:
        a, b = (one.score, -one.costs["macs"]), (other.score, -other.costs["macs"])
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    run_ = [row for row in rows if row.score is not None]
    unbeaten = {(row.costs["macs"], row.score) for row in run_ if not any(beats(other, row) for other in run_)}
    found = front(rows, "macs")
    assert [(row.costs["macs"], row.score) for row in found] == sorted(unbeaten)


def test_every_point_of_the_front_can_be_made_again_from_the_table(tmp_path, monkeypatch):
    search = functools.partial(
        optuna_search, candidates=12, sampler="nsga2", objectives=("score", "cost"), population=4
    )
    after = run(begin(tmp_path / "search"), search, HALF)
    path = tmp_path / artifacts.FRONT
    path.write_text(after.outcome.files[artifacts.FRONT])
    rows = table(after, artifacts.FRONT)
    assert rows
    for row in rows:
        made = run(
            begin(tmp_path / row["candidate"]),
            functools.partial(chosen, search=path, candidate=int(row["candidate"])),
            HALF,
        )
        for group in ("0", "3"):
            kept = int(made.masks[f"{group}.weight"].flatten(1).any(1).sum()) if f"{group}.weight" in made.masks else 8
            assert kept == int(row[f"kept:{group}"])


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"search": "front.csv"}, "go together"),
        ({"candidate": 1}, "go together"),
        ({"search": "none.csv", "candidate": 1}, "none.csv"),
        ({"search": "front.csv", "candidate": 9}, "column `candidate`"),
        ({"search": "front.csv", "candidate": 2}, "from 1 to 8"),
        ({"search": "front.csv", "candidate": 3}, "from 1 to 8"),
        ({"search": "other.csv", "candidate": 1}, "other groups of units: 3, 4"),
        ({"search": "binary.csv", "candidate": 1}, "UTF-8"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_line(keys, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "front.csv").write_text("candidate,kept:0,kept:3\n1,4,4\n2,9,4\n3,1e3,4\n")
    (tmp_path / "other.csv").write_text("candidate,kept:0,kept:4\n1,4,4\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScheduleError, match=word) as caught:
        run(begin(tmp_path / "stage"), functools.partial(chosen, **keys), HALF)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ the policy


def test_a_policy_is_left_and_decides_for_another_network(tmp_path):
    search = functools.partial(amc, episodes=8, warmup=3)
    left = run(begin(tmp_path / "a"), search, HALF).outcome.files[artifacts.POLICY]
    path = tmp_path / artifacts.POLICY
    path.write_bytes(left)
    apply = functools.partial(amc, episodes=0, policy=path)
    other = Granularity(Filter(), budget=Budget(macs=0.6), scope="layer")
    first, again = (run(begin(tmp_path / place), apply, other) for place in "bc")
    assert len(table(first)) == 1 and timeless(first.outcome.files[artifacts.SEARCH]) == timeless(
        again.outcome.files[artifacts.SEARCH]
    )
    assert first.outcome.files[artifacts.POLICY] == left
    on = run(begin(tmp_path / "d"), functools.partial(amc, episodes=5, warmup=2, policy=path), other)
    assert len(table(on)) == 5
    assert timeless(on.outcome.files[artifacts.SEARCH])[0]["macs"] == table(first)[0]["macs"]


@pytest.mark.parametrize("content", [b"", b"no policy", None])
def test_what_is_no_policy_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / artifacts.POLICY
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ScheduleError, match="policy") as caught:
        run(begin(tmp_path / "stage"), functools.partial(amc, episodes=0, policy=path), HALF)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "../outside", "a/b", ""])
def test_a_schedule_leaves_no_file_in_place_of_ours(name, tmp_path):
    def schedule(problem):
        yield Leave(name, b"")

    with pytest.raises(ScheduleError, match="plain name"):
        run(begin(tmp_path), schedule, HALF)
