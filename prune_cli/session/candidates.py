"""Candidates of an `Evaluate`: tried out on the network itself, which is bit for bit as before afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.data.dataset import Batch
from prune_cli.errors import Interrupted, ScheduleError
from prune_cli.granularities.units import Group
from prune_cli.measure.accuracy import accuracy
from prune_cli.pipeline.state import State, derive_seed
from prune_cli.schedules.requests import Evaluate, Kept
from prune_cli.selection.select import Selection, counted
from prune_cli.session.learning import EVALUATION_BATCH
from prune_cli.session.session import Session
from prune_cli.structure.modes import evaluating
from prune_cli.training.batch_norm import has_statistics, recalibrate_bn
from prune_cli.training.fit import Progress

log = logging.getLogger(__name__)

QUIET = 10.0  # least seconds between two lines of progress
PART = 10  # one of so many training images is looked at where none are held out

Score = float | None
Weights = dict[str, Tensor]


def evaluate(
    session: Session,
    request: Evaluate,
    position: int,
    known: Mapping[int, Score],
    note: Callable[[int, Score], None],
) -> list[Score]:
    """A score per candidate; with `adopt` the best stays.

    Args:
        position: of the request among all, for its random numbers.
        known: scores of candidates that an earlier run of the stage has evaluated.
        note: told of every new score at once, on every rank.

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
    problem, trial = session.problem, _Trial(session, request, position)
    scores = dict(known)
    for index, kept in enumerate(request.candidates):
        if request.within is not None and problem.cost(kept) > request.within:
            scores[index] = None
    with _as_before(session.model, trial.weights):
        left = [index for index in range(len(request.candidates)) if index not in scores]
        _in_turns(session, trial, left, scores, note)
    found = [scores[index] for index in range(len(request.candidates))]
    if request.adopt:
        adopt(session, request, position, found, trial)
    return found


def _in_turns(
    session: Session, trial: _Trial, left: list[int], scores: dict[int, Score], note: Callable[[int, Score], None]
) -> None:
    """Every process tries one candidate, then all hear of all."""
    world, progress = session.state.world, _Progress(session.state.stage, len(left))
    for start in range(0, len(left), world.size):
        turn = left[start : start + world.size]
        own = torch.zeros(len(turn), dtype=torch.double)
        if world.rank < len(turn):
            own[world.rank] = trial(turn[world.rank])
        for index, score in zip(turn, world.total(own).tolist(), strict=True):
            scores[index] = score
            note(index, score)
        progress.tell(len(turn), [score for score in scores.values() if score is not None])
        if index != left[-1] and world.any(session.state.interrupted()):
            raise Interrupted(
                f"stopped in {session.state.stage} between two candidates; the same command goes on there"
            )


def best_of(scores: list[Score]) -> int:
    """The first of the best candidates.

    Raises:
        ScheduleError: none was run.
    """
    run = [index for index, score in enumerate(scores) if score is not None]
    if not run:
        raise ScheduleError("schedule: every candidate costs more than it may; none can be adopted")
    return max(run, key=lambda index: (scores[index], -index))


def adopt(session: Session, request: Evaluate, position: int, scores: list[Score], trial: _Trial | None = None) -> None:
    """Leaves the best candidate's masks in the session, and in the network the weights that it was scored with.

    Args:
        trial: has tried the candidates out; None: what it found is to be found again.
    """
    trial = trial or _Trial(session, request, position)
    index = best_of(scores)
    selection, world = trial.selection(request.candidates[index]), session.state.world
    mine = trial.best if trial.best is not None and trial.best[0] == index else None
    holder = int(world.total(torch.tensor(float(world.rank + 1 if mine else 0)))) - 1
    if holder < 0:  # it was scored before the stage was cut: with the same bits again
        holder = 0
        if world.main:
            with _as_before(session.model, trial.weights):
                trial.prepare(index)
                mine = index, _copied(session.model)
    weights = mine[1] if mine else None
    if world.size > 1:
        weights = world.broadcast_tensors(weights if world.rank == holder else None, holder)
    assert weights is not None
    session.model.load_state_dict(weights)
    session.keep(selection, session.held())
    session.fix()


class _Trial:
    """Tries candidates of one request out.

    Attributes:
        weights: of the network as it was.
        best: index of the best candidate that this process has tried, and its weights, where it may be adopted.
    """

    def __init__(self, session: Session, request: Evaluate, position: int) -> None:
        self._session, self._request = session, request
        self._seed = derive_seed(session.state.stage_seed, "evaluate", position)
        self._groups: list[Group] | None = None
        self._score = float("-inf")
        self.best: tuple[int, Weights] | None = None
        self.weights = _copied(session.model)
        self._statistics = session.statistics(session.criterion)

    def __call__(self, index: int) -> float:
        """A candidate's accuracy in percent on held-out images."""
        session = self._session
        self.prepare(index)
        score = accuracy(session.model, held_out(session.state, session.calibration.images)).acc1
        if self._request.adopt and score > self._score:
            self._score, self.best = score, (index, _copied(session.model))
        return score

    def prepare(self, index: int) -> None:
        """Puts a candidate's masks on the network as it was, and trains it or estimates its norm statistics."""
        session, model = self._session, self._session.model
        model.load_state_dict(self.weights)
        selection = self.selection(self._request.candidates[index])
        held = masking.joined(session.held(), selection.masks)
        masks = session.granularity.complete(model, session.state.example_inputs(), held, session.plan)
        masking.apply(model, masks)
        if self._request.train:
            torch.manual_seed(derive_seed(self._seed, index))
            epochs, loss = self._request.train, session.loss()
            own = _copied(loss) if isinstance(loss, nn.Module) else None
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
        elif has_statistics(model):
            calibration = session.calibration
            recalibrate_bn(model, session.state.data.calibration(calibration.images, calibration.batch_size))

    def selection(self, kept: Kept) -> Selection:
        """The masks of a candidate, chosen on the network as it was; scores are found once for all candidates."""
        session = self._session
        if session.criterion.reads("request") or self._groups is None:
            with _with_weights(session.model, self.weights):
                self._groups = session.scored(self._statistics, kept)
        return counted(session.granularity, session.model, self._groups, kept)


class _Progress:
    """A line now and then: candidates done, how many a minute, the best so far."""

    def __init__(self, stage: str, count: int) -> None:
        self._stage, self._count, self._done = stage, count, 0
        self._began = self._told = time.monotonic()

    def tell(self, more: int, scores: list[float]) -> None:
        self._done += more
        now = time.monotonic()
        if now - self._told < QUIET:
            return
        self._told = now
        rate = 60 * self._done / (now - self._began)
        log.info(
            "%s: candidate %d of %d  %.3g a minute  best %.2f %%",
            self._stage,
            self._done,
            self._count,
            rate,
            max(scores),
        )


def held_out(state: State, skip: int) -> Iterable[Batch]:
    """Images to score on: the validation split, or a part of the training images where there is none; never test.

    Args:
        skip: training images that norm statistics are estimated on, which are left out where others are enough.
    """
    if state.data.has_val:
        return state.data.evaluation("val", EVALUATION_BATCH)
    count = max(state.data.sizes["train"] // PART, 1)
    skip = min(skip, state.data.sizes["train"] - count)
    return _behind(state.data.calibration(skip + count, EVALUATION_BATCH), skip)


def _behind(batches: Iterable[Batch], skip: int) -> Iterator[Batch]:
    """The images after the first `skip`; all where there are no more."""
    found = [(images[max(skip - at, 0) :], labels[max(skip - at, 0) :]) for at, images, labels in _placed(batches)]
    left = [(images, labels) for images, labels in found if len(labels)]
    return iter(left or list(batches))


def _placed(batches: Iterable[Batch]) -> Iterator[tuple[int, Tensor, Tensor]]:
    at = 0
    for images, labels in batches:
        yield at, images, labels
        at += len(labels)


@contextmanager
def _as_before(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Afterwards the network, its modes and the random numbers to come are what they were, bit for bit."""
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices), evaluating(model):
        try:
            yield
        finally:
            model.load_state_dict(weights)


@contextmanager
def _with_weights(model: nn.Module, weights: Weights) -> Iterator[None]:
    now = _copied(model)
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(now)


def _copied(model: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
