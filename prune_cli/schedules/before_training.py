"""Pruning before training: rounds of scoring and masking, without any training in between (SynFlow, arXiv:2006.05467)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prune_cli.schedules.choices import removed_by
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask
from prune_cli.schedules.schedule import Requests, trains_at_most


@trains_at_most(lambda: 0)
def before_training(problem: Problem, *, rounds: Annotated[int, Field(ge=1)] = 100) -> Requests:
    """After round k of n the density is rho^(k / n); each round scores what the rounds before have left (algorithm 1).

    Scores of the masked network see what each layer still has: so none is emptied while others are full. One round is SNIP
    (arXiv:1810.02340) and GraSP (arXiv:2002.07376), by criterion.

    Args:
        problem: what is pruned; rho is what its ratio leaves, or what may remain of its budget.
        rounds: n.
    """
    for number in range(1, rounds + 1):
        yield Mask(removed_by(problem, number / rounds))
