"""Pruning: carries out the requests of a schedule, and can stop and resume between and inside any two of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from prune_cli import fit as loop
from prune_cli import masks as masking
from prune_cli import shrinking
from prune_cli.criteria import requirements
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Calibration, Statistics, collect
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.fit import LrSchedule, OptimizerFactory, Options, Progress
from prune_cli.granularities.granularity import Coupled, Granularity, Selection, select
from prune_cli.processes import same_masks
from prune_cli.schedules.requests import Done, Mask, Memo, Request, Train
from prune_cli.stages import learning
from prune_cli.state import Outcome, State

log = logging.getLogger(__name__)

Schedule = Callable[[Memo | None], tuple[Memo, Request]]

FIT, MASKS = "fit/", "masks/"


@dataclass
class _Course:
    """Where a pruning stands: the memo before the pending request, masks, and the training that goes on."""

    memo: Memo | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    progress: Progress | None = None
    facts: dict[str, float] = field(default_factory=dict)

    def tensors(self, state: State) -> dict[str, Tensor]:
        training = self.progress or Progress()
        return {FIT + name: value for name, value in training.tensors(state.model).items()} | {
            MASKS + name: value for name, value in self.masks.items()
        }

    def numbers(self) -> dict[str, Any]:
        training = self.progress or Progress()
        return {"memo": self.memo, "fit": training.numbers(), "facts": self.facts, "trained": self.progress is not None}


def prune(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    schedule: Schedule,
    distillation: Distillation,
    batch_size: int,
    optimizer: OptimizerFactory,
    lr_schedule: LrSchedule,
    label_smoothing: float = 0.0,
    fit: Options,
    calibration: Calibration,
) -> State:
    """Chooses what to remove, in the steps that the schedule asks for, and trains in between where it asks.

    When the schedule is done, a granularity with `shrink` takes the masked units out of the network: so every
    schedule works with masks alone, and what is saved between its requests has one shape.

    Args:
        batch_size: images per step of the training that a schedule asks for.
        label_smoothing: share of the target spread over all classes, in [0, 1).
        calibration: images for criteria that need them.
    """
    course = _resumed(state, optimizer)
    loss = None
    while True:
        memo, request = schedule(course.memo)
        if isinstance(request, Done):
            break
        if isinstance(request, Mask):
            selection = _mask(state, course, request, criterion, granularity, calibration)
            course.facts = _facts(selection)
            course.masks = selection.masks
            masking.apply(state.model, course.masks)
        elif isinstance(request, Train):
            if request.enforce and course.masks:
                course.masks = _completed(state, granularity, course.masks)
            loss = loss or learning.objective(state, distillation, label_smoothing)
            _train(state, course, request, loss, batch_size, optimizer, lr_schedule, fit)
        course.memo = memo
        state.keep(course.tensors(state), course.numbers())
    if course.masks:
        course.masks = _completed(state, granularity, course.masks)
    facts = course.facts
    outcome = Outcome(
        epochs=course.progress.epoch if course.progress else 0,
        select_on=fit.select_on if course.progress else None,
        ratio_requested=facts.get("requested"),
        ratio_prunable=facts["removed"] / max(facts["units"], 1) if facts else None,
        ratio_channels=facts["channels_removed"] / facts["channels"] if facts.get("channels") else None,
        history=tuple(course.progress.history) if course.progress else (),
    )
    after = state.evolve(masks=course.masks or state.masks, outcome=outcome)
    return shrinking.shrink_state(after, granularity.units) if granularity.shrink else after


def _completed(state: State, granularity: Granularity, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks with what they leave useless, applied to the network."""
    completed = granularity.complete(state.model, state.example_inputs(), masks)
    masking.apply(state.model, completed)
    return completed


def check(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    schedule: Schedule,
    distillation: Distillation,
    fit: Options,
) -> None:
    """Refuses combinations that make no sense for this network, before anything is trained.

    Raises:
        ConfigError: says why and what would be legal.
    """
    learning.check_options(state, fit)
    learning.check_teacher(state, distillation)
    if fit.select_on != "last":
        raise ConfigError(
            f"{state.stage}.fit.select_on={fit.select_on}: masks change during pruning, so only the last epoch has "
            "all of them; select on a split in finetune instead"
        )
    schedule(None)
    granularity.check(state.model, criterion, state.example_inputs())
    requirements.check(criterion, granularity, state.model, state.data, state.example_inputs())
    _check_coupling(state, granularity)


def _check_coupling(state: State, granularity: Granularity) -> None:
    """Refuses to prune by other norms than those that an earlier stage made sparse."""
    if state.sparse_norms is None or not isinstance(granularity.units, Coupled):
        return
    matching = {"inner": ("inner_only",), "all": ("group", "union_keep")}[state.sparse_norms]
    if granularity.dependency not in matching:
        raise ConfigError(
            f"{state.stage}: granularity.dependency={granularity.dependency}, but the network was made sparse with "
            f"regulariser.norms={state.sparse_norms}, which goes with dependency={' or '.join(matching)}"
        )


def _facts(selection: Selection) -> dict[str, float]:
    """The numbers of a selection that a resumed stage reports too."""
    names = ("requested", "units", "removed", "channels", "channels_removed")
    return {name: value for name in names if (value := getattr(selection, name)) is not None}


def _mask(
    state: State,
    course: _Course,
    request: Mask,
    criterion: Criterion,
    granularity: Granularity,
    calibration: Calibration,
) -> Selection:
    # What an earlier stage removed stays removed; what this one did, only where the schedule says so.
    held: Mapping[str, Tensor] = (course.masks or state.masks) if request.monotone else state.masks
    selection = select(
        granularity,
        criterion,
        state.model,
        state.example_inputs(),
        share=request.share,
        masked=held,
        statistics=statistics_of(state, criterion, granularity, calibration),
        seed=state.stage_seed % 2**62,
    )
    selection = replace(selection, masks=masking.joined(held, selection.masks))
    same_masks(state.world, selection.masks)
    log.info("%s: removed %d of %d units", state.stage, selection.removed, selection.units)
    return selection


def statistics_of(state: State, criterion: Criterion, granularity: Granularity, calibration: Calibration) -> Statistics:
    """What the criterion needs, measured on the network as it is now, with its loss on the labels alone."""
    images = requirements.needs_images(criterion)
    return collect(
        state.model,
        state.data.calibration(calibration.images, calibration.batch_size) if images else (),
        criterion.needs,
        learning.cross_entropy(0.0),
        state.example_inputs(),
        at=criterion.at,
        names=list(granularity.ratios(state.model)),
    )


def _train(
    state: State,
    course: _Course,
    request: Train,
    loss: loop.Loss,
    batch_size: int,
    optimizer: OptimizerFactory,
    lr_schedule: LrSchedule,
    options: Options,
) -> None:
    def save(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        state.keep(
            {FIT + name: value for name, value in tensors.items()}
            | {MASKS + name: value for name, value in course.masks.items()},
            course.numbers() | {"fit": numbers, "trained": True},
        )

    course.progress = learning.learn(
        state,
        loss,
        epochs=request.of,
        until=request.until,
        batch_size=batch_size,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        options=options,
        masks=course.masks if request.enforce else state.masks,
        progress=course.progress,
        save=save,
    )


def _resumed(state: State, optimizer: OptimizerFactory) -> _Course:
    found = state.unfinished()
    if not found:
        return _Course()
    tensors, numbers = found
    fit_tensors = {name.removeprefix(FIT): value for name, value in tensors.items() if name.startswith(FIT)}
    progress = loop.restore(state.model, optimizer, fit_tensors, numbers["fit"])
    masks = {
        name.removeprefix(MASKS): value.to(state.device) for name, value in tensors.items() if name.startswith(MASKS)
    }
    log.info("%s: going on from epoch %d, step %d", state.stage, progress.epoch + 1, progress.step)
    return _Course(numbers["memo"], masks, progress if numbers["trained"] else None, numbers["facts"])
