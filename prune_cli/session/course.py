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
from prune_cli.schedules.requests import Request, fingerprint
from prune_cli.schedules.schedule import Requests, Schedule
from prune_cli.session.journal import Journal, Record
from prune_cli.session.session import Session
from prune_cli.training.fit import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """What a request is carried out with, besides the session.

    Attributes:
        position: of the request among all, from 0.
        parts: answers that make up this one's and are known from before the stage was cut, by number.
        note: keeps another one of those.
        save: keeps a checkpoint inside the request, given the tensors and numbers of its training.
    """

    position: int
    parts: Mapping[int, Any]
    note: Callable[[int, Any], None]
    save: Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]


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
    """

    def __init__(self, schedule: Schedule, session: Session, again: Again) -> None:
        self._session, self._world = session, session.state.world
        self._journal = Journal(session.state.slot.folder, self._world)
        self._written = time.monotonic()
        self.request: Request | None = None
        self.position = 0
        self._parts: Mapping[int, Any] = {}
        if not self._resumed(schedule, again):
            problem = session.pose()
            self._journal.begin(problem.to_dict())
            self._asking = schedule(problem)
            self._ask(None)

    def turn(self) -> Turn:
        """What the present request is carried out with."""
        assert self.request is not None
        name = fingerprint(self.request)
        return self._turn(self.position, self._parts, lambda index, answer: self._journal.part(name, index, answer))

    def answer(self, answer: Any) -> None:
        """Takes the answer of the present request to the journal and to the schedule, which asks the next.

        Raises:
            Interrupted: the user asked to stop; a checkpoint was written.
        """
        assert self.request is not None
        heard = self._world.broadcast(_plain(answer))
        self._journal.answered(fingerprint(self.request), heard)
        self.position, self._parts = self.position + 1, {}
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

    def _ask(self, heard: Any) -> None:
        self.request = _next(self._asking, heard)
        if self.request is not None:
            self._world.agree("the schedule's request", fingerprint(self.request))

    def _turn(self, position: int, parts: Mapping[int, Any], note: Callable[[int, Any], None]) -> Turn:
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
        self._session.problem = problems[position]
        if found:
            self._session.restore(*found)
        for index in range(position, len(requests)):
            turn = self._turn(index, {}, lambda *_: None)
            again(requests[index], self._session, turn, _decoded(record.answers[index][1]))
            self._session.problem = problems[index + 1]
        self.position, self._parts = len(requests), record.parts
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
