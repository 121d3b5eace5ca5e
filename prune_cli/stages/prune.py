"""Pruning: carries out the requests of a schedule, and can stop and resume between and inside any two of them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Annotated

from prune_cli.config.nodes import Flat
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Calibration
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.pipeline.stage import Parameters, Stage
from prune_cli.pipeline.state import State
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Evaluate, Leave, Mask, Request, Train
from prune_cli.schedules.schedule import Schedule, first_request, most_epochs, tries
from prune_cli.selection import requirements
from prune_cli.selection.granularity import Granularity
from prune_cli.session import search_table, teaching
from prune_cli.session.course import Course, Heard
from prune_cli.session.perform import again, perform
from prune_cli.session.posing import pose
from prune_cli.session.session import Session, optimizer_steps, tags
from prune_cli.structure.follow import analyse
from prune_cli.structure.plan import Plan
from prune_cli.training.training import Training

log = logging.getLogger(__name__)


def check(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    schedule: Schedule,
    distillation: Distillation,
    training: Training,
) -> State:
    """Refuses combinations that make no sense for this network, before anything is trained.

    Returns:
        the state as later stages will find it: it says whether the network is smaller then.

    Raises:
        ConfigError: says why and what would be legal.
        ScheduleError: what the schedule finds wrong with the problem.
    """
    teaching.check(state, distillation)
    if training.fit.select_on != "last":
        raise ConfigError(
            f"{state.stage}.fit.select_on={training.fit.select_on}: masks change during pruning, so only the last epoch has "
            "all of them; select on a split in finetune instead"
        )
    granularity.check(state.model, criterion, state.example_inputs(), _plan_once(state))
    first = _first(state, criterion, granularity, schedule, training)
    at_random = isinstance(first, Mask) and first.random
    if at_random and state.trained_by:
        log.warning(
            "%s: it begins with masks at random, which spoil what %s has learned: leave that stage out, as stages=[%s], or "
            "set schedule.begin=criterion", state.stage, state.trained_by, state.stage,
        )  # fmt: skip
    later = at_random or isinstance(first, Train)
    requirements.check(criterion, granularity, state.model, state.data, state.example_inputs(), trained=later)
    _check_coupling(state, granularity)
    return state.evolve(shrunk_by=state.stage) if granularity.shrink else state


def _epochs(parameters: Parameters) -> int | None:
    return most_epochs(parameters["schedule"])


def _tries(parameters: Parameters) -> bool:
    return tries(parameters["schedule"])


@Stage(check=check, trains=_epochs, tries=_tries, removes=True, reads_weights=True)
def prune(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    schedule: Schedule,
    distillation: Distillation,
    training: Annotated[Training, Flat()],
    calibration: Calibration,
) -> State:
    """Chooses what to remove, in the steps that the schedule asks for, and trains in between where it asks.

    When the schedule is done, a granularity with `shrink` takes the masked units out of the network: so most schedules
    work with masks alone.

    Args:
        training: how to train where the schedule asks for it.
        calibration: images for criteria that need them, and for the norm statistics of candidates.
    """
    session = Session(
        state,
        criterion=criterion,
        granularity=granularity,
        calibration=calibration,
        distillation=distillation,
        training=training,
        epochs=most_epochs(schedule),
    )
    course = Course(schedule, session, again)
    while course.request is not None:
        course.answer(perform(course.request, session, course.turn()))
    return session.result({**search_table.files(course.heard, _title(state)), **_left(course.heard)})


def _title(state: State) -> str:
    split = "val" if state.data.has_val else "part of train"
    return f"{state.architecture.name}, {state.data.name} {split}"


def _left(heard: Sequence[Heard]) -> dict[str, str | bytes]:
    """Name -> content of the files that the schedule leaves."""
    return {one.request.name: one.request.content for one in heard if isinstance(one.request, Leave)}


def _plan_once(state: State) -> Callable[[], Plan]:
    return functools.partial(state.once, "plan", functools.partial(analyse, state.model, state.example_inputs()))


def _first(
    state: State, criterion: Criterion, granularity: Granularity, schedule: Schedule, training: Training
) -> Request | None:
    """What the schedule will ask first of this network; its parameters are checked by asking."""
    image, known, seed = state.example_inputs(), tags(state), state.stage_seed
    plan = _plan_once(state)
    asked = granularity.asked(state.model, criterion, plan)
    steps, learns = optimizer_steps(state, training), criterion.reads("training")

    def posed() -> Problem:
        return pose(
            granularity,
            state.model,
            image,
            asked=asked,
            masked={},
            tags=known,
            seed=seed,
            steps=steps,
            plan=plan,
            learns=learns,
            rough=True,
        )

    problem = state.once(("problem", repr(granularity), tuple(asked.items()), known, seed, steps, learns), posed)
    first = first_request(schedule, problem)
    if not problem.countable and (isinstance(first, Evaluate) or (isinstance(first, Mask) and first.kept is not None)):
        raise ConfigError(
            "schedule: it says how many units each layer keeps, but units of this granularity are chosen by patterns; "
            "choose granularity=filter, element, kernel or stripe, or another schedule"
        )
    return first


def _check_coupling(state: State, granularity: Granularity) -> None:
    """Refuses to prune by other norms than those that an earlier stage made sparse."""
    if state.sparse_norms is None or not granularity.units.coupled:
        return
    matching = {"inner": ("inner_only",), "all": ("group", "union_keep")}[state.sparse_norms]
    if granularity.dependency not in matching:
        raise ConfigError(
            f"{state.stage}: granularity.dependency={granularity.dependency}, but the network was made sparse with "
            f"regulariser.norms={state.sparse_norms}, which goes with dependency={' or '.join(matching)}"
        )
