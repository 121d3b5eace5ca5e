"""What holds for every schedule in the recipe folder: a new file is tested by existing."""

from __future__ import annotations

import numpy as np
import pytest

from prune_cli.config.locations import options
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError, ScheduleError
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Train, fingerprint
from prune_cli.schedules.schedule import most_epochs, trains
from prune_cli.selection.granularity import Granularity
from prune_cli.session.course import _decoded
from prune_cli.stages.prune import check
from tests.session.tiny import (
    ALWAYS,
    L2,
    MOVEMENT,
    NEVER,
    Cut,
    begin,
    cut_after,
    cut_at_step,
    journal,
    option,
    result,
    training,
)  # fmt: skip
from tests.session.tiny import run as run_with

SCHEDULES = sorted(options("schedule"))
ELEMENT = {"acdc", "rigl", "set"}  # of which single weights come back


def granularity(name: str = "filter", **keys) -> Granularity:
    return option("granularity", name, Granularity, **keys)


def units(name: str) -> Granularity:
    """What a schedule prunes where nothing else is said: filters, if it can."""
    return granularity("element" if name in ELEMENT else "filter")


def criterion(name: str):
    """What it ranks by: scores that are learned, if it asks for them."""
    return MOVEMENT if name == "movement" else L2


def run(state, name: str, chosen: Granularity, **keys):
    """The stage with a shipped schedule."""
    return run_with(state, option("schedule", name), chosen, criterion(name), **keys)


def asked(schedule, problem: Problem, answers: list) -> list[str]:
    """Fingerprints of what a schedule asks when it is started afresh and hears these answers."""
    asking = schedule(problem)
    made = [fingerprint(next(asking))]
    for answer in answers:
        try:
            made.append(fingerprint(asking.send(_decoded(answer))))
        except StopIteration:
            made.append("done")
    return made


@pytest.mark.parametrize("name", SCHEDULES)
def test_replaying_any_prefix_of_the_journal_asks_the_same_next_request(name, tmp_path):
    schedule = option("schedule", name)
    run(begin(tmp_path), name, units(name))
    record = journal(tmp_path)
    answers = [answer for _, answer in record.answers]
    wanted = [name for name, _ in record.answers] + ["done"]
    assert len(wanted) > 1
    for length in range(len(answers) + 1):
        made = asked(schedule, Problem.from_dict(record.problem), answers[:length])
        assert made == wanted[: length + 1]


@pytest.mark.parametrize("most", [3, pytest.param(10**6, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("seconds", [NEVER, ALWAYS], ids=["no checkpoints", "checkpoints"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_cut_after_any_request_the_stage_ends_with_the_same_bytes(name, seconds, most, tmp_path, monkeypatch):
    wanted = result(run(begin(tmp_path / "calm"), name, units(name), seconds=seconds))
    count = len(journal(tmp_path / "calm").answers)
    for answers in sorted({round(place) for place in np.linspace(1, count, min(count, most))}):
        place = tmp_path / str(answers)
        with monkeypatch.context() as patch:
            cut_after(patch, answers)
            with pytest.raises(Cut):
                run(begin(place), name, units(name), seconds=seconds)
        assert len(journal(place).answers) == answers
        assert result(run(begin(place), name, units(name), seconds=seconds)) == wanted, answers
        assert journal(place) == journal(tmp_path / "calm")


@pytest.mark.parametrize("steps", [(6,), pytest.param((2, 9), marks=pytest.mark.slow)], ids=["middle", "ends"])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if trains(option("schedule", name))])
def test_killed_inside_a_training_the_stage_ends_with_the_same_bytes(name, steps, tmp_path, monkeypatch, caplog):
    wanted = result(run(begin(tmp_path / "calm"), name, units(name), seconds=ALWAYS))
    for step in steps:  # of three steps an epoch
        place = tmp_path / str(step)
        with monkeypatch.context() as patch:
            cut_at_step(patch, step)
            with pytest.raises(Cut):
                run(begin(place), name, units(name), seconds=ALWAYS)
        caplog.clear()
        assert result(run(begin(place), name, units(name), seconds=ALWAYS)) == wanted, step
        assert "begins again" not in caplog.text


def searches(place) -> bool:
    """Whether the stage scored candidates: the answer to `Evaluate` is a list."""
    return any(isinstance(answer, list) for _, answer in journal(place).answers)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", sorted(options("granularity")))
def test_it_ends_for_every_legal_granularity(name, kind, tmp_path):
    schedule = option("schedule", name)
    keys = {"ratio": 0.75} if kind == "pattern" else {"ratio": 0.5}
    chosen = granularity(kind, **keys)
    state = begin(tmp_path)
    try:
        check(
            state,
            criterion=criterion(name),
            granularity=chosen,
            schedule=schedule,
            distillation=Distillation(),
            training=training(),
        )
    except (ConfigError, ScheduleError) as error:
        assert "choose" in str(error)  # only what is said to be illegal is left out
        return
    after = run(state, name, chosen)
    ratio = keys["ratio"]
    asked_for = after.outcome.ratio_prunable - ratio
    assert asked_for >= -0.06 and (asked_for <= 0.06 or searches(tmp_path))  # a search may end below its budget
    assert after.outcome.epochs <= (most_epochs(schedule) or after.outcome.epochs)


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_it_says_of_its_length_is_an_upper_bound(name, tmp_path):
    schedule = option("schedule", name)
    after = run(begin(tmp_path), name, units(name))
    bound = most_epochs(schedule)
    assert bound is None or after.outcome.epochs <= bound
    made = asked(schedule, Problem.from_dict(journal(tmp_path).problem), [])
    assert trains(schedule) or Train.__name__ not in made
