"""What a schedule is, and what it says of itself before it runs.

@trains_at_most(lambda epochs: epochs)
def my_schedule(problem: Problem, *, epochs: int) -> Requests:
    yield Mask()
    yield Train(epochs)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Request, Train

Requests = Generator[Request, Any, None]
"""A schedule at work: it yields requests and is sent their answers."""

Schedule = Callable[[Problem], Requests]
"""A schedule with its parameters bound."""

BOUND, TRIES, CANDIDATES = "most_epochs", "tries_candidates", "most_candidates"

Function = TypeVar("Function", bound=Callable[..., Requests])


def trains_at_most(epochs: Callable[..., int], *, tries: bool = False) -> Callable[[Function], Function]:
    """Declares how many epochs a schedule trains at most, short trainings of candidates not counted.

    Args:
        epochs: called with those of the schedule's parameters that it names.
        tries: whether it also tries candidates out, which takes time that nobody knows beforehand.
    """

    def declare(schedule: Function) -> Function:
        setattr(schedule, BOUND, epochs)
        setattr(schedule, TRIES, tries)
        return schedule

    return declare


def tries_at_most(candidates: Callable[..., int]) -> Callable[[Function], Function]:
    """Declares how many candidates a search scores at most.

    Args:
        candidates: called with those of the schedule's parameters that it names, and with `problem` where it names that.
    """

    def declare(schedule: Function) -> Function:
        setattr(schedule, CANDIDATES, candidates)
        return schedule

    return declare


def most_epochs(schedule: Schedule) -> int | None:
    """Epochs that a schedule trains at most; None where it does not say."""
    return _declared(schedule, BOUND, {})


def most_candidates(schedule: Schedule, problem: Problem) -> int | None:
    """Candidates that a schedule scores at most; None where it does not say."""
    return _declared(schedule, CANDIDATES, {"problem": problem})


def _declared(schedule: Schedule, what: str, known: Mapping[str, Any]) -> int | None:
    function = _function(schedule)
    bound: Callable[..., int] | None = getattr(function, what, None)
    if bound is None:
        return None
    given = schedule.keywords if isinstance(schedule, functools.partial) else {}
    parameters = inspect.signature(function).bind_partial(**given)
    parameters.apply_defaults()
    values = {**parameters.arguments, **known}
    return bound(**{name: values[name] for name in inspect.signature(bound).parameters})


def tries(schedule: Schedule) -> bool:
    """Whether a schedule tries candidates out, as far as it says."""
    return bool(getattr(_function(schedule), TRIES, False))


def _function(schedule: Schedule) -> Callable[..., Requests]:
    return schedule.func if isinstance(schedule, functools.partial) else schedule


def first_request(schedule: Schedule, problem: Problem) -> Request | None:
    """What a schedule asks first, which checks its parameters: nothing is carried out. None: nothing at all.

    Raises:
        ConfigError, ScheduleError: what the schedule finds wrong with its parameters or the problem.
    """
    asked = schedule(problem)
    try:
        return next(asked, None)
    finally:
        asked.close()


def trains(schedule: Schedule) -> bool:
    """Whether a schedule may train the network: one that does not say how long may."""
    return most_epochs(schedule) != 0


def trains_first(schedule: Schedule, problem: Problem) -> bool:
    """Whether a schedule trains the network before it chooses anything."""
    return isinstance(first_request(schedule, problem), Train)
