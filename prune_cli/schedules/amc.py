"""AMC: an agent that learns what to keep of one layer after the other (He et al., arXiv:1802.03494)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from prune_cli.config.locations import find_file
from prune_cli.errors import PruneError, ScheduleError
from prune_cli.files import artifacts
from prune_cli.files.weights import read_state_dict
from prune_cli.schedules.choices import countable
from prune_cli.schedules.ddpg import Agent, Transition
from prune_cli.schedules.problem import Group, Problem
from prune_cli.schedules.requests import ACCEPTED, Evaluate, Judge, Kept, Leave, Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most, tries_at_most

MEMORY = 100  # transitions that are kept, per group


@trains_at_most(lambda epochs: epochs, tries=True)
@tries_at_most(lambda episodes: max(episodes, 1))
def amc(
    problem: Problem,
    *,
    episodes: Annotated[int, Field(ge=0)] = 400,
    warmup: Annotated[int, Field(ge=0)] = 100,
    least: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    reward: Literal["accuracy", "accuracy_and_cost"] = "accuracy",
    noise_decay: Annotated[float, Field(gt=0, le=1)] = 0.99,
    policy: Path | None = None,
    epochs: Annotated[int, Field(ge=0)] = 0,
) -> Requests:
    """Episodes of decisions, from the first group of layers to the last; what the best kept is removed in the end.

    What the agent has learned is left as `policy.safetensors`, the weights of its actor: a function of facts about a group,
    none of which depends on the network's size.

    Args:
        problem: what is pruned.
        episodes: choices that are scored, in all; 0 with a `policy`: it decides once, without a search.
        warmup: episodes that explore at random before the agent learns; fewer than `episodes`. With a `policy` it decides
            in them instead, with noise.
        least: fraction of a group that always stays, beside the granularity's own floors.
        reward: `accuracy` = minus the error, with actions bounded so that every episode meets the budget;
            `accuracy_and_cost` = minus the error times log(cost), without a budget (section 3.4).
        noise_decay: factor on the noise of actions from episode to episode.
        policy: file that an earlier search has left, of this network or another: the agent begins with it, and its first
            choice is without noise.
        epochs: with the masks at the end.

    Raises:
        ScheduleError: no episode is left to learn in, the budget lies below the floors, or the file is no policy.
    """
    countable(problem, "amc")
    if policy is None and warmup >= episodes:
        raise ScheduleError(f"schedule: warmup={warmup} leaves none of episodes={episodes}; give more episodes")
    groups = sorted(problem.groups, key=lambda group: group.depth)
    bounded = reward == "accuracy"
    floors = problem.counts({group.name: least for group in groups})
    if bounded and problem.cost(floors) > problem.budget:
        raise ScheduleError(
            f"schedule: least={least:g} and the floors leave {problem.cost(floors):g} {problem.quantity}, but "
            f"{problem.budget:g} are asked for; give a smaller least or a larger budget"
        )
    sight = _Sight(problem, groups)
    agent = Agent(sight.features, problem.generator("amc"), MEMORY * len(groups), noise_decay)
    if policy is not None:
        _taught(agent, policy, sight.features)
    best, best_reward = problem.whole, -math.inf
    for episode in range(max(episodes, 1)):
        kept: dict[str, int] = {}
        steps: list[tuple[np.ndarray, float]] = []
        action = 1.0
        for index, group in enumerate(groups):
            state = sight.state(index, kept, action)
            low, high = _bounds(problem, group, kept, floors, bounded)
            if policy is None and episode < warmup:
                action = agent.explore(low, high)
            else:
                action = agent.act(state, low, high, noise=policy is None or episode > 0)
            kept[group.name] = _count(problem, group, action, low, high)
            steps.append((state, action))
        (accuracy,) = yield Evaluate([kept])
        error = 1 - accuracy / 100
        found = -error if bounded else -error * math.log(max(problem.cost(kept), math.e))
        if found > best_reward:
            best, best_reward = dict(kept), found
            yield Judge([ACCEPTED])
        else:
            yield Judge([f"a reward of {found:.5g}, and {best_reward:.5g} is the best so far"])
        afters = [state for state, _ in steps[1:]]
        made = [Transition(s, a, found, n) for (s, a), n in zip(steps, [*afters, None], strict=True)]
        if episode < warmup:
            agent.remember(made)
        else:
            agent.learn(made)
    yield Leave(artifacts.POLICY, agent.policy())
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


class _Sight:
    """What the agent sees (section 3.1): facts of a group's layers, what was saved, what is left, what it did last.

    All in [0, 1]: facts are divided by their largest value in the network.

    Attributes:
        features: numbers in a state.
    """

    def __init__(self, problem: Problem, groups: list[Group]) -> None:
        facts = np.array([_facts(group) for group in groups])
        self._problem, self._whole, self._cost = problem, problem.whole, problem.cost(problem.whole)
        self._facts = facts / np.maximum(facts.max(axis=0), 1e-12)
        macs = facts[:, -1]
        self._rest = 1 - np.cumsum(macs) / max(macs.sum(), 1e-12)
        self.features = facts.shape[1] + 4

    def state(self, index: int, kept: Kept, action: float) -> np.ndarray:
        """What it sees before it decides about a group."""
        saved = 1 - self._problem.cost({**self._whole, **kept}) / self._cost
        place = index / max(len(self._facts) - 1, 1)
        return np.array([place, *self._facts[index], saved, self._rest[index], action])


def _taught(agent: Agent, policy: Path, features: int) -> None:
    """Gives the agent the actor of a file.

    Raises:
        ScheduleError: it cannot be read, or is none.
    """
    try:
        agent.follow(read_state_dict(find_file(policy)))
    except PruneError as error:
        raise ScheduleError(f"schedule.policy={policy}: {error}") from error
    except RuntimeError as error:
        raise ScheduleError(
            f"schedule.policy={policy}: no policy of this version, whose agent sees {features} numbers; give the "
            f"{artifacts.POLICY} of a run with schedule=amc"
        ) from error


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
