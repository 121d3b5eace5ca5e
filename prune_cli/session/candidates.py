"""Candidates of an `Evaluate`: tried out on the network itself, which is bit for bit as before afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from prune_cli.errors import Interrupted, ScheduleError
from prune_cli.measure.accuracy import accuracy
from prune_cli.pipeline.state import derive_seed
from prune_cli.progress import Shown, shown
from prune_cli.schedules.requests import Evaluate
from prune_cli.session.bench import Bench, Key, copied, held_out
from prune_cli.session.passes import Weights
from prune_cli.session.session import Session
from prune_cli.structure.modes import evaluating
from prune_cli.training.fit import Progress

log = logging.getLogger(__name__)

Score = float | None


def evaluate(
    session: Session,
    request: Evaluate,
    position: int,
    known: Mapping[int, Score],
    note: Callable[[int, Score, float], None],
) -> list[Score]:
    """A score per candidate; with `adopt` the best stays.

    Args:
        position: of the request among all, for its random numbers.
        known: scores of candidates that an earlier run of the stage has evaluated.
        note: told of every new score at once, with the seconds that it took, on every rank.

    Raises:
        Interrupted: the user asked to stop; what is known by then was noted.
        ScheduleError: a candidate that cannot be, or none to adopt.
    """
    assert session.problem is not None
    if not session.state.data.has_val and not session.warned:
        session.warned = True
        log.warning(
            "%s: candidates are scored on a part of the training images, as dataset.val=0 leaves no others; set dataset.val "
            "to a fraction", session.state.stage,
        )  # fmt: skip
    trial, candidates = _Trial(session, request, position), request.candidates
    scores = dict(known)
    for index, kept in enumerate(candidates):
        if request.within is not None and session.problem.cost(kept) > request.within:
            scores[index] = None
    session.tally.known(*_told(session, request, scores))
    with _as_before(session.model, trial.bench.weights):
        _in_turns(session, trial, [index for index in range(len(candidates)) if index not in scores], scores, note)
    found = [scores[index] for index in range(len(candidates))]
    if request.adopt:
        adopt(session, request, position, found, trial)
    return found


def _in_turns(
    session: Session,
    trial: _Trial,
    left: Sequence[int],
    scores: dict[int, Score],
    note: Callable[[int, Score, float], None],
) -> None:
    """Every process tries one candidate, then all hear of all; one whose score is known already is not run."""
    world = session.state.world
    new = trial.new(left)
    trial.expect(new)
    with shown(f"{session.state.stage}: search", session.tally.total) as bar:
        session.tally.begin()
        for start in range(0, len(new), world.size):
            turn = new[start : start + world.size]
            own = torch.zeros(2, len(turn), dtype=torch.double)
            if world.rank < len(turn):
                began = time.monotonic()
                own[0, world.rank] = trial(turn[world.rank])
                own[1, world.rank] = time.monotonic() - began
            found, seconds = world.total(own).tolist()
            for index, score, spent in zip(turn, found, seconds, strict=True):
                scores[index] = trial.take(index, score)
                note(index, score, spent)
            _tell(session, trial, turn, found, bar)
            if turn[-1] != left[-1] and world.any(session.state.interrupted()):
                raise Interrupted(
                    f"stopped in {session.state.stage} between two candidates; the same command goes on there"
                )
        again = [index for index in left if index not in scores]
        for index in again:
            scores[index] = trial.bench.known[trial.key(index)]
            note(index, scores[index], 0.0)
        _tell(session, trial, again, [trial.bench.known[trial.key(index)] for index in again], bar)


def _tell(session: Session, trial: _Trial, turn: Sequence[int], scores: Sequence[float], bar: Shown) -> None:
    assert session.problem is not None
    costs = [session.problem.fraction(trial.request.candidates[index]) for index in turn]
    session.tally.tell(scores, costs, bar)


def _told(session: Session, request: Evaluate, scores: Mapping[int, Score]) -> tuple[list[Score], list[float]]:
    assert session.problem is not None
    return list(scores.values()), [session.problem.fraction(request.candidates[index]) for index in scores]


def remember(session: Session, request: Evaluate, scores: Sequence[Score]) -> None:
    """Takes scores that an earlier run of the stage has found of the network as it is now."""
    if not request.train:
        bench = at(session)
        for kept, score in zip(request.candidates, scores, strict=True):
            if score is not None:
                bench.known[bench.key(kept)] = score


def at(session: Session) -> Bench:
    """The session's bench, which knows the network as it is now."""
    if session.bench is None or not session.bench.of(session):
        session.bench = Bench(session)
    elif session.touched:
        session.bench.look()
    session.touched = False
    found: Bench = session.bench
    return found


def best_of(scores: Sequence[Score]) -> int:
    """The first of the best candidates.

    Raises:
        ScheduleError: none was run.
    """
    run = [(score, -index) for index, score in enumerate(scores) if score is not None]
    if not run:
        raise ScheduleError("schedule: every candidate costs more than it may; none can be adopted")
    return -max(run)[1]


def adopt(
    session: Session, request: Evaluate, position: int, scores: Sequence[Score], trial: _Trial | None = None
) -> None:
    """Leaves the best candidate's masks in the session, and in the network the weights that it was scored with.

    Args:
        trial: has tried the candidates out; None: what it found is to be found again.
    """
    trial = trial or _Trial(session, request, position)
    index = best_of(scores)
    selection, world = trial.bench.selection(request.candidates[index]), session.state.world
    mine = trial.best if trial.best is not None and trial.best[0] == index else None
    holder = int(world.total(torch.tensor(float(world.rank + 1 if mine else 0)))) - 1
    if holder < 0:  # it was not trained, or before the stage was cut: with the same bits again
        holder = 0
        if world.main:
            with _as_before(session.model, trial.bench.weights):
                trial.prepare(index)
                mine = index, copied(session.model)
    weights = mine[1] if mine else None
    if world.size > 1:
        weights = world.broadcast_tensors(weights if world.rank == holder else None, holder)
    assert weights is not None
    session.model.load_state_dict(weights)
    session.keep(selection, session.held())
    session.fix()
    session.touched = True


class _Trial:
    """Tries candidates of one request out.

    Attributes:
        bench: what is known of the network.
        best: index of the best candidate that this process has trained, and its weights, where it may be adopted.
    """

    def __init__(self, session: Session, request: Evaluate, position: int) -> None:
        self._session, self.request, self.bench = session, request, at(session)
        self._seed = derive_seed(session.state.stage_seed, "evaluate", position)
        self._score = float("-inf")
        self.best: tuple[int, Weights] | None = None

    def key(self, index: int) -> Key:
        """What makes candidates the same."""
        return self.bench.key(self.request.candidates[index])

    def new(self, left: Sequence[int]) -> list[int]:
        """Those of the candidates that have to be run: the first of equal ones, unless each is trained."""
        if self.request.train:
            return list(left)
        first = {self.key(index): index for index in reversed(left)}
        return sorted(index for key, index in first.items() if key not in self.bench.known)

    def expect(self, new: Sequence[int]) -> None:
        """Gets ready for candidates that are to be run."""
        if not self.request.train:
            self.bench.expect([self.request.candidates[index] for index in new])

    def take(self, index: int, score: float) -> float:
        """Remembers a score."""
        if not self.request.train:
            self.bench.known[self.key(index)] = score
        return score

    def __call__(self, index: int) -> float:
        """A candidate's accuracy in percent on held-out images."""
        if not self.request.train:
            return self.bench.score(self.request.candidates[index])
        session = self._session
        self.prepare(index)
        score = accuracy(session.model, held_out(session.state, session.calibration.images)).acc1
        if self.request.adopt and score > self._score:
            self._score, self.best = score, (index, copied(session.model))
        return score

    def prepare(self, index: int) -> None:
        """Puts a candidate's masks on the network as it was, and trains it or estimates its norm statistics."""
        session, kept = self._session, self.request.candidates[index]
        if not self.request.train:
            self.bench.prepare(kept)
            return
        masks = self.bench.mask(self.bench.selection(kept))
        torch.manual_seed(derive_seed(self._seed, index))
        epochs, loss = self.request.train, session.loss()
        own = copied(loss) if isinstance(loss, nn.Module) else None
        session.train(
            Progress(),
            epochs=epochs,
            until=(epochs, 0),
            masks=masks,
            save=lambda *_: None,
            candidate=True,
            seed=self._seed,
        )
        if own is not None and isinstance(loss, nn.Module):
            loss.load_state_dict(own)


@contextmanager
def _as_before(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Afterwards the network, its modes and the random numbers to come are what they were, bit for bit."""
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices), evaluating(model):
        try:
            yield
        finally:
            model.load_state_dict(weights)
