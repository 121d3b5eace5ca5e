"""Pruning: carries out the requests of a schedule, and can stop and resume between and inside any two of them."""

from __future__ import annotations

from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Calibration
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.granularities.units import Coupled
from prune_cli.pipeline.state import State
from prune_cli.schedules.requests import Evaluate, Mask, Request, Train
from prune_cli.schedules.schedule import Schedule, first_request
from prune_cli.selection import requirements
from prune_cli.selection.granularity import Granularity
from prune_cli.stages import learning, teaching
from prune_cli.stages.course import Course
from prune_cli.stages.perform import again, perform
from prune_cli.stages.posing import pose
from prune_cli.stages.session import Session, Training, tags
from prune_cli.training.fit import BatchSize, LrSchedule, OptimizerFactory, Options, Smoothing


def prune(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    schedule: Schedule,
    distillation: Distillation,
    batch_size: BatchSize,
    optimizer: OptimizerFactory,
    lr_schedule: LrSchedule,
    label_smoothing: Smoothing = 0.0,
    fit: Options,
    calibration: Calibration,
) -> State:
    """Chooses what to remove, in the steps that the schedule asks for, and trains in between where it asks.

    When the schedule is done, a granularity with `shrink` takes the masked units out of the network: so most schedules
    work with masks alone.

    Args:
        batch_size: images per step of the training that a schedule asks for.
        label_smoothing: share of the target spread over all classes, in [0, 1).
        calibration: images for criteria that need them, and for the norm statistics of candidates.
    """
    session = Session(
        state,
        criterion=criterion,
        granularity=granularity,
        calibration=calibration,
        distillation=distillation,
        training=Training(batch_size, optimizer, lr_schedule, label_smoothing, fit),
    )
    course = Course(schedule, session, again)
    while course.request is not None:
        course.answer(perform(course.request, session, course.turn()))
    return session.result()


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
        ScheduleError: what the schedule finds wrong with the problem.
    """
    learning.check_options(state, fit)
    teaching.check(state, distillation)
    if fit.select_on != "last":
        raise ConfigError(
            f"{state.stage}.fit.select_on={fit.select_on}: masks change during pruning, so only the last epoch has "
            "all of them; select on a split in finetune instead"
        )
    granularity.check(state.model, criterion, state.example_inputs())
    first = _first(state, granularity, schedule)
    requirements.check(
        criterion, granularity, state.model, state.data, state.example_inputs(), trained=isinstance(first, Train)
    )
    _check_coupling(state, granularity)


def _first(state: State, granularity: Granularity, schedule: Schedule) -> Request | None:
    """What the schedule will ask first of this network; its parameters are checked by asking."""
    asked = granularity.ratios(state.model)
    image, known, seed = state.example_inputs(), tags(state), state.stage_seed
    problem = pose(granularity, state.model, image, asked=asked, masked={}, tags=known, seed=seed, rough=True)
    first = first_request(schedule, problem)
    if not problem.countable and (isinstance(first, Evaluate) or (isinstance(first, Mask) and first.kept is not None)):
        raise ConfigError(
            "schedule: it says how many units each layer keeps, but units of this granularity are chosen by patterns; "
            "choose granularity=filter, element, kernel or stripe, or another schedule"
        )
    return first


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
