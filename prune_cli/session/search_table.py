"""What a search has tried: a table of all candidates, one of those that no other beats, and a plot of both.

Rows are made of the requests that the schedule asked and the answers of its journal, so that a stage that was cut and goes
on leaves those of one that was not; only the seconds are what they were.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prune_cli.files import artifacts
from prune_cli.schedules.problem import Problem, Quantity
from prune_cli.schedules.requests import ACCEPTED, Evaluate, Judge, Kept
from prune_cli.session.candidates import best_of
from prune_cli.session.course import Heard
from prune_cli.session.search_plot import Dot, plot

log = logging.getLogger(__name__)

COUNTED: tuple[Quantity, ...] = ("macs", "params")
FACTS = ("round", "candidate", *COUNTED)


@dataclass(frozen=True)
class Tried:
    """A candidate of a search.

    Attributes:
        round: number of the `Evaluate` that it was part of, from 1.
        candidate: its number among all of the stage, from 1.
        costs: of each quantity, by arithmetic.
        score: percent on held-out images; None where it was not run.
        seconds: that it took; None where it was not run, or its score was known.
        verdict: `accepted`, or the reason why not.
        kept: units that stay, by group.
    """

    round: int
    candidate: int
    costs: dict[Quantity, float]
    score: float | None
    seconds: float | None
    verdict: str
    kept: dict[str, int]


def tried(heard: Sequence[Heard]) -> list[Tried]:
    """All candidates in the order in which the schedule named them."""
    rows: list[Tried] = []
    number = 0
    for one in heard:
        if isinstance(one.request, Evaluate):
            number += 1
            rows += _of_round(number, len(rows), one, one.request)
        elif isinstance(one.request, Judge):
            last = [row for row in rows if row.round == number][-len(one.request.verdicts) :]
            given = zip(last, one.request.verdicts, strict=True)
            rows[len(rows) - len(last) :] = [replace(row, verdict=verdict) for row, verdict in given]
    return rows


def _of_round(number: int, before: int, one: Heard, request: Evaluate) -> list[Tried]:
    problem, scores = one.problem, one.answer
    quantities = dict.fromkeys((*COUNTED, problem.quantity))
    best = best_of(scores) if request.adopt and any(score is not None for score in scores) else None
    return [
        Tried(
            number,
            before + index + 1,
            {quantity: problem.cost(kept, quantity) for quantity in quantities},
            scores[index],
            one.seconds.get(index) or None,
            _verdict(problem, request, kept, scores[index], best, index, before),
            {**problem.whole, **kept},
        )
        for index, kept in enumerate(request.candidates)
    ]


def _verdict(
    problem: Problem, request: Evaluate, kept: Kept, score: float | None, best: int | None, index: int, before: int
) -> str:
    """What can be seen of a candidate without the schedule's saying."""
    if score is None:
        return f"costs {problem.cost(kept):.6g} {problem.quantity}, more than the {request.within:.6g} allowed"
    if best is None:
        return "scored"
    return ACCEPTED if index == best else f"candidate {before + best + 1} is better"


def front(rows: Sequence[Tried], quantity: Quantity) -> list[Tried]:
    """Those that no other beats, which is at least as good in score and in cost and better in one; cheapest first.

    Of equal ones the first.
    """
    best, found = float("-inf"), []
    for row in sorted(rows, key=lambda row: (row.costs[quantity], -(row.score or 0), row.candidate)):
        if row.score is not None and row.score > best:
            best = row.score
            found.append(row)
    return found


def text(rows: Sequence[Tried]) -> str:
    """CSV: a row per candidate, a column per group of units, `kept:GROUP`; empty cells where there is nothing to say."""
    groups = list(dict.fromkeys(name for row in rows for name in row.kept))
    more = list(dict.fromkeys(key for row in rows for key in row.costs if key not in COUNTED))
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([*FACTS, *more, "score", "seconds", "verdict", *(f"{artifacts.KEPT}{name}" for name in groups)])
    for row in rows:
        cells: list[Any] = [row.round, row.candidate, *(row.costs.get(key) for key in (*COUNTED, *more))]
        cells += [row.score, row.seconds, row.verdict, *(row.kept.get(name) for name in groups)]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return lines.getvalue()


def files(heard: Sequence[Heard], title: str) -> dict[str, str | bytes]:
    """Name -> content of what a search leaves; nothing where no candidate was asked for.

    Args:
        title: of the plot, which is left out where matplotlib is not installed.
    """
    rows = tried(heard)
    if not rows:
        return {}
    problem = next(one.problem for one in heard if isinstance(one.request, Evaluate))
    best = front(rows, problem.quantity)
    found: dict[str, str | bytes] = {artifacts.SEARCH: text(rows), artifacts.FRONT: text(best)}
    if importlib.util.find_spec("matplotlib") is None:
        log.info("%s is not drawn; it needs matplotlib: pip install 'prune-cli[plot]'", artifacts.SEARCH_PLOT)
        return found
    on_front = {row.candidate for row in best}
    dots = [
        Dot(row.costs[problem.quantity], row.score, row.verdict == ACCEPTED, row.candidate in on_front)
        for row in rows
        if row.score is not None
    ]
    found[artifacts.SEARCH_PLOT] = plot(dots, problem.quantity, problem.budget, title)
    return found
