"""AMC: an agent that learns what to keep of one layer after the other (He et al., arXiv:1802.03494)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from prune_cli.errors import ScheduleError
from prune_cli.schedules.choices import countable
from prune_cli.schedules.ddpg import Agent, Transition
from prune_cli.schedules.problem import Group, Problem
from prune_cli.schedules.requests import Evaluate, Kept, Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most

MEMORY = 100  # transitions that are kept, per group


@trains_at_most(lambda epochs: epochs, tries=True)
def amc(
    problem: Problem,
    *,
    episodes: Annotated[int, Field(ge=2)] = 400,
    warmup: Annotated[int, Field(ge=1)] = 100,
    least: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    reward: Literal["accuracy", "accuracy_and_cost"] = "accuracy",
    noise_decay: Annotated[float, Field(gt=0, le=1)] = 0.99,
    epochs: Annotated[int, Field(ge=0)] = 0,
) -> Requests:
    """Episodes of decisions, from the first group of layers to the last; what the best kept is removed in the end.

    Args:
        problem: what is pruned.
        episodes: choices that are scored, in all.
        warmup: episodes that explore at random before the agent learns; fewer than `episodes`.
        least: fraction of a group that always stays, beside the granularity's own floors.
        reward: `accuracy` = minus the error, with actions bounded so that every episode meets the budget;
            `accuracy_and_cost` = minus the error times log(cost), without a budget (section 3.4).
        noise_decay: factor on the noise of actions from episode to episode.
        epochs: with the masks at the end.

    Raises:
        ScheduleError: no episode is left to learn in, or the budget lies below the floors.
    """
    countable(problem, "amc")
    if warmup >= episodes:
        raise ScheduleError(f"schedule: warmup={warmup} leaves none of episodes={episodes}; give more episodes")
    groups = sorted(problem.groups, key=lambda group: group.depth)
    bounded = reward == "accuracy"
    floors = problem.counts({group.name: least for group in groups})
    if bounded and problem.cost(floors) > problem.budget:
        raise ScheduleError(
            f"schedule: least={least:g} and the floors leave {problem.cost(floors):g} {problem.quantity}, but "
            f"{problem.budget:g} are asked for; give a smaller least or a larger budget"
        )
    agent = Agent(len(_state(problem, groups, 0, {}, 1.0)), problem.generator("amc"), MEMORY * len(groups), noise_decay)
    best, best_reward = problem.whole, -math.inf
    for episode in range(episodes):
        kept: dict[str, int] = {}
        steps: list[tuple[np.ndarray, float]] = []
        action = 1.0
        for index, group in enumerate(groups):
            state = _state(problem, groups, index, kept, action)
            low, high = _bounds(problem, group, kept, floors, bounded)
            action = agent.explore(low, high) if episode < warmup else agent.act(state, low, high)
            kept[group.name] = _count(problem, group, action, low, high)
            steps.append((state, action))
        (accuracy,) = yield Evaluate([kept])
        error = 1 - accuracy / 100
        found = -error if bounded else -error * math.log(max(problem.cost(kept), math.e))
        if found > best_reward:
            best, best_reward = dict(kept), found
        afters = [state for state, _ in steps[1:]]
        made = [Transition(s, a, found, n) for (s, a), n in zip(steps, [*afters, None], strict=True)]
        if episode < warmup:
            agent.remember(made)
        else:
            agent.learn(made)
    yield Mask(kept=best)
    if epochs:
        yield Train(epochs)


def _bounds(problem: Problem, group: Group, kept: Kept, floors: Kept, bounded: bool) -> tuple[float, float]:
    """Fractions of a group's units that may stay so that the budget can be met when the rest goes to its floors."""
    low = floors[group.name] / group.units
    if not bounded:
        return low, group.whole / group.units
    rest = {**floors, **kept}
    sizes = [size for size in range(floors[group.name], group.whole + 1) if _legal(group, size)]
    first, last = 0, len(sizes) - 1  # the largest size that can be paid lies in between
    while first < last:
        middle = (first + last + 1) // 2
        if problem.cost({**rest, group.name: sizes[middle]}) <= problem.budget:
            first = middle
        else:
            last = middle - 1
    return low, sizes[first] / group.units


def _legal(group: Group, size: int) -> bool:
    return size == group.whole or size % group.multiple == 0


def _count(problem: Problem, group: Group, action: float, low: float, high: float) -> int:
    """The legal number of units nearest above the action that does not exceed the upper bound."""
    wanted = problem.counts({group.name: action})[group.name]
    return min(wanted, round(high * group.units)) if wanted > round(low * group.units) else round(low * group.units)


def _state(problem: Problem, groups: list[Group], index: int, kept: Kept, action: float) -> np.ndarray:
    """What the agent sees (section 3.1): facts of the group's layers, what was saved, what is left, what it did last.

    All in [0, 1]: facts are divided by their largest value in the network.
    """
    facts = np.array([_facts(group) for group in groups])
    largest = np.maximum(facts.max(axis=0), 1e-12)
    whole = problem.cost(problem.whole)
    saved = 1 - problem.cost({**problem.whole, **kept}) / whole
    macs = facts[:, -1]
    rest = macs[index + 1 :].sum() / max(macs.sum(), 1e-12)
    return np.array([index / max(len(groups) - 1, 1), *(facts[index] / largest), saved, rest, action])


def _facts(group: Group) -> list[float]:
    """Kind, outputs, inputs, kernel, stride, image size, params and multiply-adds of the group's layers."""
    first = group.layers[0] if group.layers else None
    if first is None:
        return [0.0] * 8
    kernel = math.prod(first.weight[2:]) if len(first.weight) > 2 else 1
    size = math.prod(first.output[1:]) if len(first.output) > 1 else 1
    return [
        float(first.kind == "Linear"),
        first.weight[0],
        first.weight[1] if len(first.weight) > 1 else 1,
        kernel,
        first.stride,
        size,
        sum(layer.params for layer in group.layers),
        sum(layer.macs for layer in group.layers),
    ]
