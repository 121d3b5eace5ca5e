"""Schedules played without a network: a problem of plain numbers, and answers made up by a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prune_cli.schedules.problem import Arithmetic, Group, Layer, Problem
from prune_cli.schedules.requests import Evaluate, Mask, Project, Request, Shrink, Train

Score = Callable[[Mapping[str, int]], float]


def toy(units: Mapping[str, int], each: Mapping[str, float], remains: float, *, fixed: float = 0, **changes) -> Problem:
    """Groups whose units cost so many multiply-adds each, and a budget of a part of them.

    Args:
        units: name -> how many; in the order of their depth.
        each: name -> multiply-adds of a unit.
        remains: fraction of all multiply-adds that may remain.
        fixed: multiply-adds of what stays anyway.
    """
    names = list(units)
    groups = tuple(
        Group(name, (Layer(name, "Conv2d", (units[name], 3, 3, 3), (units[name], 8, 8), 1, 9, 9),), units[name],
              units[name], 1, 1, 1 - remains, depth)
        for depth, name in enumerate(names)
    )  # fmt: skip
    terms = tuple((index, float(each[name]), (index,)) for index, name in enumerate(names))
    terms += ((len(names), float(fixed), ()),) if fixed else ()
    arithmetic = Arithmetic(
        fixed=(0.0,) * len(names),
        positions=tuple((index, index, float(units[name])) for index, name in enumerate(names)),
        params=terms,
        macs=terms,
        layers=(*names, "rest"),
        units=tuple(units.values()),
        times={},
    )
    whole = sum(units[name] * each[name] for name in names) + fixed
    facts = {
        "quantity": "macs", "budget": remains * whole, "countable": True, "shrinks": False,
        "tags": ("init", "fresh", "500st"), "seed": 0, "steps": 10, "scope": "layer",
    }  # fmt: skip
    return Problem(groups=groups, arithmetic=arithmetic, **{**facts, **changes})


def play(schedule, problem: Problem, score: Score = lambda kept: 0.0) -> list[Request]:
    """All that a schedule asks when candidates score as a function of what they keep says."""
    asking, made = schedule(problem), []
    answer = None
    while True:
        try:
            request = asking.send(answer)
        except StopIteration:
            return made
        made.append(request)
        match request:
            case Evaluate():
                most = math.inf if request.within is None else request.within
                answer = [score(kept) if problem.cost(kept) <= most else None for kept in request.candidates]
            case Mask():
                answer = {"kept": dict(request.kept or problem.whole)}
            case Train():
                answer = {"epoch": 0, "loss": 0.0, "acc1": None}
            case Shrink():
                answer = problem
            case Project():
                answer = {}
            case _:
                answer = None


def asking(*requests: Request):
    """A schedule that asks for these, and keeps what it hears in `heard`."""
    heard = []

    def schedule(problem: Problem):
        for request in requests:
            heard.append((yield request))

    schedule.heard = heard
    return schedule
