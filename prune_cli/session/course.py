"""A schedule on its way: what it asks, what it has heard, and how a stage that was cut goes on.

The schedule is started afresh and fed with the answers of the journal. Up to the newest checkpoint nothing is carried out;
behind it, what changes the network is carried out again, with the same bits, and what only looks is not.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prune_cli.errors import Interrupted, PruneError
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import LOOKING, Evaluate, Request, changes, fingerprint
from prune_cli.schedules.schedule import Requests, Schedule, most_candidates
from prune_cli.session.journal import Journal, Record
from prune_cli.session.session import Session
from prune_cli.training.fit import Progress

log = logging.getLogger(__name__)

DIGITS = 4  # of a candidate's seconds


@dataclass(frozen=True)
class Turn:
    """What a request is carried out with, besides the session.

    Attributes:
        position: of the request among all, from 0.
        parts: answers that make up this one's and are known from before the stage was cut, by number.
        note: keeps another one of those, and the seconds that it took.
        save: keeps a checkpoint inside the request, given the tensors and numbers of its training.
    """

    position: int
    parts: Mapping[int, Any]
    note: Callable[[int, Any, float], None]
    save: Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]


@dataclass(frozen=True)
class Heard:
    """A request that looked at candidates or left a file, and its answer.

    Attributes:
        problem: when it was asked.
        seconds: that candidates took, by number.
    """

    request: Request
    problem: Problem
    answer: Any
    seconds: Mapping[int, float]


Again = Callable[[Request, Session, Turn, Any], None]
"""Carries out a request whose answer is known."""


class Course:
    """The requests of one schedule, one after another.

    Args:
        schedule: with its parameters.
        session: that its requests change; it goes on where an earlier run of the stage stopped.
        again: carries out a request whose answer is known.

    Attributes:
        request: what is asked now; None: the schedule is done.
        position: requests answered so far.
        heard: those among them that looked at candidates or left a file, in all runs of the stage.
    """

    def __init__(self, schedule: Schedule, session: Session, again: Again) -> None:
        self._session, self._world = session, session.state.world
        self._journal = Journal(session.state.slot.folder, self._world)
        self._written = time.monotonic()
        self.request: Request | None = None
        self.position = 0
        self.heard: list[Heard] = []
        self._parts: Mapping[int, Any] = {}
        self._seconds: dict[int, float] = {}
        if not self._resumed(schedule, again):
            problem = session.pose()
            self._journal.begin(problem.to_dict())
            self._asking = schedule(problem)
            self._ask(None)
        assert session.problem is not None
        session.tally.total = most_candidates(schedule, session.problem)

    def turn(self) -> Turn:
        """What the present request is carried out with."""
        assert self.request is not None
        name = fingerprint(self.request)

        def note(index: int, answer: Any, seconds: float) -> None:
            self._seconds[index] = round(seconds, DIGITS)  # as the journal has it
            self._journal.part(name, index, answer, self._seconds[index])

        return self._turn(self.position, self._parts, note)

    def answer(self, answer: Any) -> None:
        """Takes the answer of the present request to the journal and to the schedule, which asks the next.

        Raises:
            Interrupted: the user asked to stop; a checkpoint was written.
        """
        assert self.request is not None
        heard = self._world.broadcast(_plain(answer))
        self._journal.answered(fingerprint(self.request), heard)
        self._take(self.request, self._session.problem, heard, self._seconds)
        self.position, self._parts, self._seconds = self.position + 1, {}, {}
        self._ask(heard)
        stopping = self._world.any(self._session.state.interrupted())
        if stopping or time.monotonic() - self._written >= self._session.training.fit.checkpoint_seconds:
            self.checkpoint()
        if stopping and self.request is not None:
            raise Interrupted(
                f"stopped in {self._session.state.stage} after {self.position} requests of the schedule; the same command "
                "goes on there"
            )

    def checkpoint(self) -> None:
        """Keeps where the stage stands between two requests."""
        training = self._session.clock.progress or Progress()
        self._save(self.position, training.tensors(self._session.model), training.numbers())

    def _take(self, request: Request, problem: Problem | None, answer: Any, seconds: Mapping[int, float]) -> None:
        assert problem is not None
        if isinstance(request, LOOKING):
            self.heard.append(Heard(request, problem, answer, seconds))

    def _ask(self, heard: Any) -> None:
        self.request = _next(self._asking, heard)
        if self.request is not None:
            self._world.agree("the schedule's request", fingerprint(self.request))

    def _turn(self, position: int, parts: Mapping[int, Any], note: Callable[[int, Any, float], None]) -> Turn:
        return Turn(position, parts, note, lambda tensors, numbers: self._save(position, tensors, numbers))

    def _save(self, position: int, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        session = self._session
        session.state.keep(session.tensors(tensors), {**session.numbers(numbers), "position": position})
        self._written = time.monotonic()

    # -------------------------------------------------------------------------------------------------- going on

    def _resumed(self, schedule: Schedule, again: Again) -> bool:
        """Goes on where an earlier run of the stage stopped; False where there is none, or it was of other code."""
        record, found = self._journal.read(), self._session.state.unfinished()
        if record.problem is None and found is None:
            return False
        position = int(found[1].get("position", -1)) if found else 0
        made = self._replayed(schedule, record) if 0 <= position <= len(record.answers) else None
        if made is None:
            log.warning(
                "%s: what an earlier run left does not fit this schedule any more, as its code or parameters changed; the "
                "stage begins again", self._session.state.stage,
            )  # fmt: skip
            if self._world.main:
                self._session.state.slot.clear()
            return False
        requests, problems = made
        for request, problem, (_, answer), spent in zip(requests, problems, record.answers, record.spent, strict=False):
            self._take(request, problem, answer, spent)
            if isinstance(request, Evaluate):
                self._session.tally.known(answer, [problem.fraction(kept) for kept in request.candidates])
        if found:
            self._session.restore(*found)
        begin = position
        while begin and not changes(requests[begin - 1]):  # scores of the network as it is now
            begin -= 1
        self._session.problem = problems[begin]
        for index in range(begin, len(requests)):
            turn = self._turn(index, {}, lambda *_: None)
            again(requests[index], self._session, turn, _decoded(record.answers[index][1]))
            self._session.problem = problems[index + 1]
        self.position, self._parts, self._seconds = len(requests), record.parts, dict(record.spending)
        if found is None or position < len(requests):
            log.info("%s: going on after %d requests of the schedule", self._session.state.stage, self.position)
        return True

    def _replayed(self, schedule: Schedule, record: Record) -> tuple[list[Request], list[Problem]] | None:
        """The requests that the journal answers, and what the problem was before each and is now; None: they differ.

        Raises:
            PruneError: what the schedule itself finds wrong after the last answer.
        """
        requests: list[Request] = []
        try:
            problem = Problem.from_dict(record.problem or {})
            problems = [problem]
            self._asking = schedule(problem)
            self.request = _next(self._asking, None)
            for number, (name, answer) in enumerate(record.answers, 1):
                if self.request is None or fingerprint(self.request) != name:
                    return None
                requests.append(self.request)
                heard = _decoded(answer)
                problems.append(heard if isinstance(heard, Problem) else problems[-1])
                last = number == len(record.answers)
                self.request = _next(self._asking, answer)
        except PruneError:
            if requests and last and len(requests) == len(record.answers):
                raise
            return None
        except (KeyError, TypeError):
            return None
        if record.pending not in (None, self.request and fingerprint(self.request)):
            return None
        return requests, problems


def _next(asking: Requests, heard: Any) -> Request | None:
    """What a schedule asks when it has heard an answer; None: nothing any more."""
    try:
        return asking.send(_decoded(heard))
    except StopIteration:
        return None


def _plain(answer: Any) -> Any:
    """An answer as the journal holds it, also where it was never there: JSON makes lists of tuples."""
    return json.loads(json.dumps({"problem": answer.to_dict()} if isinstance(answer, Problem) else answer))


def _decoded(heard: Any) -> Any:
    return Problem.from_dict(heard["problem"]) if isinstance(heard, dict) and set(heard) == {"problem"} else heard
