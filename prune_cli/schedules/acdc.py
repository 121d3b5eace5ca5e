"""AC/DC: phases of sparse and of dense training take turns (Peste et al., arXiv:2106.12379)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prune_cli.errors import ScheduleError
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most

WARMUP, PHASE, FINAL = 0.1, 0.05, 0.15
"""Of the epochs: the dense beginning, each phase, and the sparse end at least, as in the paper's trainings on ImageNet."""


@trains_at_most(lambda epochs: epochs)
def acdc(
    problem: Problem,
    *,
    epochs: Annotated[int, Field(ge=1)],
    warmup_epochs: Annotated[int, Field(ge=0)] | None = None,
    compressed_epochs: Annotated[int, Field(ge=1)] | None = None,
    decompressed_epochs: Annotated[int, Field(ge=1)] | None = None,
    final_epochs: Annotated[int, Field(ge=1)] | None = None,
) -> Requests:
    """Dense warm-up; then compressed phases, with the masks held, and decompressed ones, in which all weights train; and a
    last compressed one (algorithm 1).

    Each compressed phase chooses among all weights anew. Momentum starts afresh in each decompressed phase: it is of
    another network, and nothing of it belongs to the weights that come back, from zero.

    Args:
        problem: what is pruned.
        epochs: length of the whole stage.
        warmup_epochs: of dense training in the beginning; 0 for a network that is trained already; None = 10 % of all.
        compressed_epochs: of each compressed phase; None = 5 %.
        decompressed_epochs: of each decompressed phase; None = 5 %.
        final_epochs: of the last compressed phase at least: it takes what is left after whole turns; None = 15 %.

    Raises:
        ScheduleError: the epochs do not hold one turn of both phases, or what is masked could not come back.
    """
    warmup = round(WARMUP * epochs) if warmup_epochs is None else warmup_epochs
    sparse, dense = (
        max(round(PHASE * epochs), 1) if own is None else own for own in (compressed_epochs, decompressed_epochs)
    )
    last = max(round(FINAL * epochs), 1) if final_epochs is None else final_epochs
    turns = (epochs - warmup - last) // (sparse + dense)
    if turns < 1:
        raise ScheduleError(
            f"schedule: epochs={epochs} do not hold warmup_epochs={warmup}, one turn of compressed_epochs={sparse} and "
            f"decompressed_epochs={dense}, and final_epochs={last}; give more epochs or shorter phases"
        )
    if not problem.regrows:
        raise ScheduleError(
            "schedule=acdc lets weights grow from zero, but a channel gets no gradient while all that reads it is zero; "
            "choose granularity=element, kernel, n_m, pattern or stripe, or schedule=soft"
        )
    if warmup:
        yield Train(warmup, epochs, soft=True)
    for _ in range(turns):
        yield Mask(monotone=False)
        yield Train(sparse, epochs, final=False)
        yield Train(dense, epochs, soft=True, fresh=True)
    yield Mask(monotone=False)
    yield Train(total=epochs)
