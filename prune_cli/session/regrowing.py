"""Carries out `Regrow`: units change places inside their groups, and what grows begins at zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.criteria import gradients, weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Statistics
from prune_cli.errors import ScheduleError
from prune_cli.granularities.units import Group
from prune_cli.masks import Enforcer
from prune_cli.pipeline.state import derive_seed
from prune_cli.schedules.requests import Regrow
from prune_cli.selection.ranking import laid_out
from prune_cli.selection.regrowth import moved
from prune_cli.selection.select import chosen, names_of
from prune_cli.session import measuring
from prune_cli.session.session import Session
from prune_cli.structure.prunable import target
from prune_cli.training.distributed import same_masks

GROWTH = {
    "gradient": Criterion(gradients.slope, needs=("gradient",), norms="batch"),
    "random": Criterion(weights.random),
}
"""What `Regrow.grow_by` scores by; the norms are those of training."""


def regrow(session: Session, request: Regrow, position: int) -> dict[str, int]:
    """How many units of each group moved.

    Args:
        position: of the request among all, for its random numbers.

    Raises:
        ScheduleError: units of this granularity cannot grow one by one.
    """
    assert session.problem is not None
    if not session.problem.regrows or not session.problem.countable:
        raise ScheduleError(
            "schedule: it lets single units grow from zero, but these cannot; choose granularity=element, kernel or stripe, "
            "or schedule=soft"
        )
    before, growth = session.held(), GROWTH[request.grow_by]
    drops = session.scored(session.statistics(session.criterion))
    seed = derive_seed(session.state.stage_seed, "regrow", position) % 2**62
    grows = session.scored(_statistics(session, growth), criterion=growth, held=session.state.masks, seed=seed)
    keeps, answer = [], {}
    for name, drop, grow in zip(names_of(drops), laid_out(drops, session.granularity.scope), grows, strict=True):
        stays = drop.scores != float("-inf")
        rows = drop.rows.positions() if drop.lines > 1 and drop.rows else None
        keeps.append(moved(stays, drop.scores, grow.scores.to(stays.device), request.fraction, rows))
        answer[name] = int((keeps[-1] & ~stays).sum())
    _take(session, drops, keeps, before)
    return answer


def _statistics(session: Session, growth: Criterion) -> Statistics:
    """What growth needs, on the images that training comes to next."""
    if not growth.needs:
        return {}
    progress = session.clock.progress
    place = (progress.epoch, progress.step) if progress else (0, 0)
    return measuring.upcoming(session.state, growth, list(session.asked), session.training, session.seed(), *place)


def _take(session: Session, groups: list[Group], keeps: list[Tensor], before: Mapping[str, Tensor]) -> None:
    """The new masks hold; what has moved is zero in the weights and in the moments."""
    selection = chosen(session.granularity, session.model, groups, keeps)
    same_masks(session.state.world, selection.masks)
    session.keep(selection, session.state.masks)
    zero = masking.joined(before, session.masks)
    progress = session.clock.progress
    if progress is None or progress.optimizer is None:
        masking.apply(session.model, zero)
    else:
        Enforcer(session.model, zero, progress.optimizer)()


@torch.no_grad()
def rescale(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Multiplies what masks leave of every output row by sqrt(weights / weights that stay).

    A row's sum over independent inputs then has the variance that it had before: networks without norms do not train
    otherwise where little is left (Evci et al., arXiv:2010.03533, section 3.1).
    """
    for name, mask in masks.items():
        one = target(model, name)
        rows = mask.to(one.weight.device).expand(one.weight.shape).movedim(one.axis, 0).flatten(1)
        factor = (rows.shape[1] / rows.sum(1).clamp_min(1)).sqrt().to(one.weight.dtype)
        one.weight.mul_(factor.view([-1 if axis == one.axis else 1 for axis in range(one.weight.dim())]))
