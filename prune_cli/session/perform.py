"""What each request of a schedule does: one function per request. `again` is for those whose answer is known."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_cli import masks as masking
from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Statistics
from prune_cli.errors import ScheduleError
from prune_cli.files import artifacts
from prune_cli.files.fitting import fit_weights
from prune_cli.granularities.units import Constraint
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import (
    LOOKING,
    Evaluate,
    Judge,
    Kept,
    Leave,
    Mask,
    Project,
    Regrow,
    Remember,
    Request,
    Restore,
    Shrink,
    Train,
)
from prune_cli.selection.select import Selection
from prune_cli.session import candidates, regrowing
from prune_cli.session.course import Turn
from prune_cli.session.remembering import snapshot
from prune_cli.session.session import Session
from prune_cli.session.standing import Removed
from prune_cli.training import admm
from prune_cli.training.fit import Progress

log = logging.getLogger(__name__)

AT_RANDOM = Criterion(weights.random)


def perform(request: Request, session: Session, turn: Turn) -> Any:
    """Carries a request out and returns its answer.

    Raises:
        ScheduleError: it cannot be carried out.
        Interrupted: the user asked to stop; what was done can be gone on from.
    """
    session.touched = session.touched or not isinstance(request, LOOKING)
    return _carry_out(request, session, turn)


@singledispatch
def _carry_out(request: Request, session: Session, turn: Turn) -> Any:
    raise ScheduleError(f"schedule: {type(request).__name__} is no request; see prune_cli/schedules/requests.py")


@singledispatch
def again(request: Request, session: Session, turn: Turn, answer: Any) -> None:
    """Carries out once more a request whose answer is known, for what it does to the network."""
    perform(request, session, turn)


@_carry_out.register
def _(request: Mask, session: Session, turn: Turn) -> dict[str, Any]:
    session.reveal()
    held, before = session.held(monotone=request.monotone), session.removed.removed
    granularity = session.whole if session.splitting.sets else session.granularity
    criterion = AT_RANDOM if request.random else session.criterion
    statistics = session.statistics(criterion)
    kept = request.kept
    if request.threshold is not None:
        kept = _above(request.threshold, request.fraction, session, statistics, held)
    quiet = request.hides or (kept is None and request.fraction < 1)  # what limits changed is said once, of everything
    selection = session.select(
        granularity, criterion, statistics, held, fraction=request.fraction, kept=kept, quiet=quiet
    )
    if request.monotone and 0 < selection.removed <= before:
        log.warning("%s: this step removes nothing that was not removed before", session.state.stage)
    session.keep(selection, held)
    session.splitting = session.splitting.ended()
    if request.hides:
        session.hide(masking.joined(held, selection.growing(session.model)))
    masking.apply(session.model, selection.growing(session.model) if request.soft else session.masks)
    if request.rescale:
        regrowing.rescale(session.model, {name: session.masks[name] for name in session.asked if name in session.masks})
    level = logging.DEBUG if request.hides else logging.INFO  # every few steps, or now and then
    log.log(level, "%s: removed %d of %d units", session.state.stage, selection.removed, selection.units)
    return _realised(selection, session)


def _above(
    threshold: float, fraction: float, session: Session, statistics: Statistics, held: Mapping[str, Tensor]
) -> dict[str, int]:
    """Units of each group that score no less than the threshold, or what the fraction leaves where that is more."""
    least = session.select(session.granularity, session.criterion, statistics, held, fraction=fraction, quiet=True).kept
    groups = session.scored(statistics, held=held)
    above = {name: int((group.scores >= threshold).sum()) for name, group in zip(least, groups, strict=True)}
    return {name: max(count, above[name]) for name, count in least.items()}


def _realised(selection: Selection, session: Session) -> dict[str, Any]:
    """What a choice keeps and costs: counted on the channel plan where there is one, else by arithmetic."""
    assert session.problem is not None
    if selection.candidate is not None:
        plan, keep = selection.candidate
        cost = plan.count(keep)
        macs, params = cost.macs, cost.params
    else:
        macs, params = (int(session.problem.cost(selection.kept, key)) for key in ("macs", "params"))
    return {
        "units": selection.units, "removed": selection.removed, "kept": dict(selection.kept), "macs": macs,
        "params": params,
    }  # fmt: skip


@_carry_out.register
def _(request: Train, session: Session, turn: Turn) -> dict[str, Any]:
    clock = session.clock
    if clock.until is None:  # else it is under way
        _begin(request, session)
    assert clock.progress is not None and clock.total is not None and clock.until is not None
    if request.final and not request.soft:
        session.fix()
    clock.progress = session.train(
        clock.progress,
        epochs=clock.total,
        until=clock.until,
        masks=session.state.masks if request.soft else session.held(),
        penalty=request.penalty,
        shrinkage=request.shrinkage,
        save=turn.save,
        seed=session.seed(),
    )
    clock.until = None
    row: Mapping[str, Any] = clock.progress.history[-1] if clock.progress.history else {}
    return {"epoch": clock.progress.epoch, "loss": row.get("loss"), "acc1": row.get("acc1")}


def _begin(request: Train, session: Session) -> None:
    """Sets the clock: on in the training that the request is a part of, or at the beginning of another."""
    clock, now = session.clock, session.clock.progress
    total = request.total if request.total is not None else request.epochs
    if total is None or (request.steps is not None and request.epochs is not None):
        raise ScheduleError("schedule: Train needs epochs or total; steps only in place of epochs")
    goes_on = request.total is not None and clock.total in (None, total) and now is not None and now.epoch < total
    if now is None or not goes_on:
        now = Progress(history=now.history, memory=now.memory) if now else Progress()
        clock.begun += 1
    elif request.fresh:
        now = replace(now, optimizer=None, loss=None)
    until = _end(request, now, total, session)
    if until > (total, 0):
        asked = f"{request.steps} steps" if request.steps is not None else f"{request.epochs} epochs"
        raise ScheduleError(f"schedule: {asked} after {now.epoch} epochs are more than the {total} of the training")
    clock.progress, clock.total, clock.until, clock.begun = now, total, until, max(clock.begun, 1)


def _end(request: Train, now: Progress, total: int, session: Session) -> tuple[int, int]:
    """Epoch, and batches of it, that a training goes to."""
    if request.steps is None:
        return (total if request.epochs is None else now.epoch + request.epochs), 0
    each = session.training.fit.accumulate
    epoch, step = divmod(now.epoch * session.steps() + -(-now.step // each) + request.steps, session.steps())
    return epoch, step * each


@_carry_out.register
def _(request: Regrow, session: Session, turn: Turn) -> dict[str, int]:
    return regrowing.regrow(session, request, turn.position)


@_carry_out.register
def _(request: Evaluate, session: Session, turn: Turn) -> list[candidates.Score]:
    return candidates.evaluate(session, request, turn.position, turn.parts, turn.note)


@again.register
def _(request: Evaluate, session: Session, turn: Turn, answer: Any) -> None:
    if request.adopt:
        candidates.adopt(session, request, turn.position, answer)
    else:
        candidates.remember(session, request, answer)


@_carry_out.register
def _(request: Judge, session: Session, turn: Turn) -> None:
    """The table of the search is made of the request itself."""


@_carry_out.register
def _(request: Leave, session: Session, turn: Turn) -> None:
    """The stage leaves what the request holds."""
    if not request.name or Path(request.name).name != request.name or artifacts.is_ours(request.name):
        raise ScheduleError(f"schedule: a file cannot be left as {request.name!r}; give a plain name that is not taken")


@_carry_out.register
def _(request: Remember, session: Session, turn: Turn) -> None:
    now = snapshot(session.model, session.masks, session.clock.progress, session.batches())
    session.snapshots[request.tag] = replace(now, facts=asdict(session.removed))
    session.left = session.left | {request.tag} if request.leave else session.left - {request.tag}


@_carry_out.register
def _(request: Restore, session: Session, turn: Turn) -> None:
    found, clock = session.snapshot(request.tag), session.clock
    if request.masks:
        session.masks = {name: mask.to(session.state.device) for name, mask in found.masks.items()}
        session.forms = session.granularity.forms(session.model, session.masks, session.asked)
        session.removed = Removed(**found.facts)
    if request.weights:
        session.hidden = {}
        fit_weights(session.model, found.weights, f"remembered as {request.tag}")
        masking.apply(session.model, masking.joined(session.state.masks, session.masks))
    now = clock.progress or Progress()
    if request.clock:
        epoch, step = found.place(session.batches())
        clock.progress = Progress(epoch=epoch, step=step, history=now.history, memory=now.memory)
        clock.total = None  # the next training says how long it is
    elif request.weights and clock.progress is not None:
        clock.progress = Progress(epoch=now.epoch, step=now.step, history=now.history, memory=now.memory)


@_carry_out.register
def _(request: Shrink, session: Session, turn: Turn) -> Problem:
    assert session.problem is not None
    if not session.problem.shrinks:
        raise ScheduleError(
            "schedule: it takes units out of the network, but these can only be masked; choose granularity=filter or "
            "stripe with granularity.shrink=true, or another schedule"
        )
    session.shrink()
    return session.pose()


@_carry_out.register
def _(request: Project, session: Session, turn: Turn) -> dict[str, Any]:
    now = {name: parameter.detach() for name, parameter in session.model.named_parameters()}
    before, progress = session.splitting, session.clock.progress
    session.splitting = before.renewed(
        now,
        {one.name: _projection(session, one, request.kept) for one in session.constraints},
        request.rho,
        progress.epoch if progress else 0,
    )
    answer = {}
    for row in session.splitting.residuals[len(before.residuals) :]:
        if row.parameter == admm.ALL:
            answer[row.constraint] = {"primal": row.primal, "dual": row.dual}
            dual = "" if row.dual is None else f", dual {row.dual:.2e}"
            log.info("%s: iteration %d, %s: primal residual %.4f%s, rho %g",
                     session.state.stage, row.iteration, row.constraint, row.primal, dual, request.rho)  # fmt: skip
    return answer


def _projection(session: Session, constraint: Constraint, kept: Kept | None) -> Any:
    """Values of weights -> the masks of their projection onto a set; statistics are those of the weights themselves."""
    criterion = constraint.criterion or session.criterion
    granularity = replace(session.granularity, units=constraint.units)
    statistics = session.statistics(criterion)

    def project(values: admm.Weights) -> Mapping[str, Tensor]:
        with admm.substituted(session.model, values):
            selection = session.select(granularity, criterion, statistics, session.state.masks, kept=kept)
            return masking.joined(session.state.masks, selection.masks)

    return project
