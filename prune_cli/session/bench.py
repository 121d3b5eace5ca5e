"""What is known of a network while candidates are tried out on it, from one `Evaluate` to the next."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.data.dataset import Batch
from prune_cli.errors import SurgeryError
from prune_cli.granularities.units import Group
from prune_cli.measure.cost import cost
from prune_cli.pipeline.state import State
from prune_cli.schedules.requests import Kept
from prune_cli.selection.select import Selection, combined, counted, names_of
from prune_cli.session.learning import EVALUATION_BATCH
from prune_cli.session.passes import Passes, Weights
from prune_cli.session.session import Session
from prune_cli.structure import surgery
from prune_cli.structure.cuts import Cut

PART = 10  # one of so many training images is looked at where none are held out
SMALLER = 0.85  # of the multiply-adds: a candidate below is scored as the smaller network that it would be

Key = tuple[tuple[str, int], ...]


class Bench:
    """Tries candidates out on a session's network, which the caller brings back.

    Args:
        session: with the network as it is now.

    Attributes:
        weights: of the network as it was when it was last looked at.
        known: score of each candidate that was tried without training since then.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._model = session, session.model
        data, calibration = session.state.data, session.calibration
        image = session.state.example_inputs()
        self._passes = Passes(
            session.model,
            lambda: data.calibration(calibration.images, calibration.batch_size),
            lambda: held_out(session.state, calibration.images),
            data.shape,
            functools.cache(lambda: {layer.name: layer.macs for layer in cost(session.model, image).layers}),
        )
        self._equal: dict[frozenset[str], bool] = {}  # groups -> whether taking out is the same as masking
        self.look()

    def of(self, session: Session) -> bool:
        """Whether this is about the network that a session has now."""
        return self._model is session.model

    def look(self) -> None:
        """Takes note of the network as it is now."""
        session, model = self._session, self._model
        self.weights = copied(model)
        self.known: dict[Key, float] = {}
        self._statistics = session.statistics(session.criterion)
        self._groups: list[Group] | None = None
        self._reach: dict[str, frozenset[str]] = {}
        held = session.held()
        if held:
            masking.apply(
                model, session.granularity.complete(model, session.state.example_inputs(), held, session.plan)
            )
        self._masked = copied(model) if held else self.weights
        model.load_state_dict(self.weights)
        self._passes.forget(self._masked)

    def key(self, kept: Kept) -> Key:
        """What makes candidates the same: the units that stay of every group."""
        assert self._session.problem is not None
        return tuple({**self._session.problem.whole, **kept}.items())

    # ---------------------------------------------------------------------------------------------------- choosing

    def selection(self, kept: Kept) -> Selection:
        """The masks of a candidate, chosen on the network as it was; scores are found once for all candidates."""
        session = self._session
        if session.criterion.reads("request") or self._groups is None:
            with with_weights(session.model, self.weights):
                self._groups = session.scored(self._statistics, kept)
        return counted(session.granularity, session.model, self._groups, kept)

    def expect(self, candidates: Sequence[Kept]) -> None:
        """Gets ready for candidates: what several have in common in front of their changes is kept."""
        if candidates:
            self.selection(candidates[0])
            self._passes.expect([self._changed(kept) for kept in candidates], self._masked)

    def _changed(self, kept: Kept) -> frozenset[str]:
        """The parameters that a candidate may change."""
        assert self._groups is not None
        if not self._reach:
            for name, group in zip(names_of(self._groups), self._groups, strict=True):
                nothing = torch.zeros(group.scores.numel(), dtype=torch.bool, device=group.scores.device)
                self._reach[name] = frozenset(combined(self._model, [group], [nothing]))
        return frozenset().union(*(self._reach[name] for name in self._fewer(kept)))

    def _fewer(self, kept: Kept) -> frozenset[str]:
        """The groups that lose units."""
        assert self._session.problem is not None
        whole = self._session.problem.whole
        return frozenset(name for name, count in kept.items() if count < whole.get(name, 0))

    # ----------------------------------------------------------------------------------------------------- trying

    def score(self, kept: Kept) -> float:
        """Accuracy of a candidate in percent on held-out images, its norm statistics estimated again."""
        selection, problem = self.selection(kept), self._session.problem
        assert problem is not None
        whole = problem.cost(problem.whole, "macs")
        found = None
        if self._session.granularity.units.shrinks and problem.cost(kept, "macs") <= SMALLER * whole:
            found = self._smaller(selection, self._fewer(kept))
        return self._passes.score(self._model, self.prepare(kept, selection)) if found is None else found

    def prepare(self, kept: Kept, selection: Selection | None = None) -> Cut | None:
        """Puts a candidate's masks on the network as it was, and estimates its norm statistics.

        Returns:
            where its execution can be gone on from.
        """
        self.mask(selection or self.selection(kept), self._passes.base)
        parameters = self._model.named_parameters()
        cut = self._passes.start([name for name, value in parameters if not torch.equal(value, self._masked[name])])
        self._passes.estimate(self._model, cut)
        return cut

    def mask(self, selection: Selection, weights: Weights | None = None) -> dict[str, Tensor]:
        """The network as it was, under a candidate's masks, which are returned whole.

        Args:
            weights: the same, with other norm statistics.
        """
        session, model = self._session, self._model
        model.load_state_dict(self.weights if weights is None else weights)
        held = masking.joined(session.held(), selection.masks)
        masks = session.granularity.complete(model, session.state.example_inputs(), held, session.plan)
        masking.apply(model, masks)
        return masks

    def _smaller(self, selection: Selection, groups: frozenset[str]) -> float | None:
        """The score of the smaller network that a candidate would be; None: it is not what the masked one is.

        Norms over channels are why; they are met where some groups lose units, whichever.
        """
        if selection.candidate is None or not self._equal.get(groups, True):
            return None
        self._model.load_state_dict(self._passes.base or self._masked)
        try:
            with _quiet():
                small = surgery.remove_units(self._model, *selection.candidate).model
        except SurgeryError:
            self._equal[groups] = False
            return None
        if groups not in self._equal:
            self.mask(selection, self._passes.base)
            self._equal[groups] = self._passes.agree(self._model, small)
        if not self._equal[groups]:
            return None
        own = dict(small.named_parameters())
        sizes = {name: value.shape for name, value in self._model.named_parameters()}
        cut = self._passes.start([name for name, size in sizes.items() if own[name].shape != size])
        self._passes.estimate(small, cut)
        return self._passes.score(small, cut)


@contextmanager
def _quiet() -> Iterator[None]:
    """What surgery has to say of a candidate, it says again of the choice."""
    before, surgery.log.disabled = surgery.log.disabled, True
    try:
        yield
    finally:
        surgery.log.disabled = before


@contextmanager
def with_weights(model: nn.Module, weights: Weights) -> Iterator[None]:
    """A network with other weights for a while."""
    now = copied(model)
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(now)


def copied(model: nn.Module) -> Weights:
    """Parameters and buffers as they are."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


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
