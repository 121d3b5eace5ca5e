"""Layer by layer, each recovered before the next, and given back where it cannot be (Pruning_approaches)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prune_cli.schedules.choices import countable
from prune_cli.schedules.problem import Group, Problem
from prune_cli.schedules.requests import ACCEPTED, Evaluate, Judge, Mask, Remember, Restore, Train
from prune_cli.schedules.schedule import Requests

BEFORE = "before"


def backward(
    problem: Problem,
    *,
    epochs: Annotated[int, Field(ge=0)],
    delta: Annotated[float, Field(ge=0)] = 1.0,
    order: Literal["backward", "forward", "sensitivity", "all_at_once"] = "backward",
    halvings: Annotated[int, Field(ge=0)] = 2,
) -> Requests:
    """Prunes one group of coupled layers after the other, from the last to the first, and recovers after each.

    What is learned from while it recovers is the stage's distillation. A group after whose recovery the accuracy on
    held-out images lies more than `delta` below that of the network that came is restored, weights and all, and tried
    with half of what should go, `halvings` times; then it stays whole.

    Args:
        problem: what is pruned; each group's target is its ratio.
        epochs: of each recovery, a training of its own.
        delta: points of accuracy in percent.
        order: of the groups: `sensitivity` = those first that lose least when they are pruned alone; `all_at_once` = one
            step and one recovery for all, which is the control.
        halvings: how often less is tried.

    Raises:
        ScheduleError: units of this granularity cannot be counted.
    """
    countable(problem, "backward")
    (reference,) = yield Evaluate([problem.whole])
    yield Judge([ACCEPTED])
    groups = sorted(problem.groups, key=lambda group: group.depth, reverse=order == "backward")
    if order == "sensitivity":
        alone = yield Evaluate([{**problem.whole, **_target(problem, group)} for group in groups])
        groups = [group for _, group in sorted(zip(alone, groups, strict=True), key=lambda pair: -pair[0])]
    steps = [groups] if order == "all_at_once" else [[group] for group in groups]
    kept = problem.whole
    for step in steps:
        for part in [2.0**-halving for halving in range(halvings + 1)]:
            trial = dict(kept)
            for group in step:
                trial |= _target(problem, group, part)
            if trial == kept:
                break
            yield Remember(BEFORE)
            yield Mask(kept=trial)
            if epochs:
                yield Train(epochs)
            (score,) = yield Evaluate([trial])
            if score >= reference - delta or order == "all_at_once":
                yield Judge([ACCEPTED])
                kept = trial
                break
            yield Judge([f"loses {reference - score:.4g} points of at most {delta:g}"])
            yield Restore(BEFORE, masks=True)


def _target(problem: Problem, group: Group, part: float = 1.0) -> dict[str, int]:
    """What stays of a group when `part` of what should go is gone."""
    return {group.name: problem.counts({group.name: 1 - group.ratio * part})[group.name]}
