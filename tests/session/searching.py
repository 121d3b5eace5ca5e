"""Throw-away schedules that use the protocol to its ends: NetAdapt, rounds that shrink, a lottery ticket."""

from __future__ import annotations

from prune_cli.errors import ScheduleError
from prune_cli.schedules.requests import Evaluate, Mask, Remember, Restore, Shrink, Train


def netadapt(problem, *, step=0.1, short_epochs=1, long_epochs=1, shrink_every=0):
    """Yang et al., ECCV 2018, algorithm 1: the layer that is cheapened with the least loss, until the budget is met."""
    kept, rounds = problem.whole, 0
    while problem.cost(kept) > problem.budget:
        allowed = max(problem.cost(kept) * (1 - step), problem.budget)
        proposals = [p for p in (problem.cheapen(kept, group, allowed) for group in problem.groups) if p]
        if not proposals:
            raise ScheduleError(f"schedule: nothing can shrink any more at {problem.cost(kept):.0f} {problem.quantity}")
        scores = yield Evaluate(proposals, train=short_epochs, adopt=True)
        kept, rounds = proposals[max(range(len(scores)), key=lambda index: scores[index])], rounds + 1
        if shrink_every and rounds % shrink_every == 0:
            problem = yield Shrink()
            kept = problem.whole
    yield Train(long_epochs)


def lottery(problem, *, rounds=2, total=3, rewind_to="early"):
    """Frankle et al., arXiv:1912.05671: what training keeps large, trained again from an early point."""
    if rewind_to == "early":
        yield Train(1, total)
        yield Remember("early")
    for number in range(1, rounds + 1):
        yield Train(total=total)
        yield Mask(1 - (1 - 0.5) ** (number / rounds))
        yield Restore(rewind_to, clock=True)
    yield Train(total=total)


def in_rounds(problem, *, shrink=True):
    """Half of the training under masks, or with the smaller network."""
    yield Train(1, total=3)
    yield Mask()
    if shrink:
        yield Shrink()
    yield Train(2, total=3)
