"""Everything at once."""

from __future__ import annotations

from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask
from prune_cli.schedules.schedule import Requests, trains_at_most


@trains_at_most(lambda: 0)
def one_shot(problem: Problem) -> Requests:
    """Masks the whole ratio in one step; recovery is left to a finetune stage."""
    yield Mask()
