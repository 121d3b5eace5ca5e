"""Alternating direction method of multipliers (arXiv:1804.03294): weights learn to be sparse before any is removed."""

from __future__ import annotations

import math

from prune_cli.errors import ConfigError
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Project, Train
from prune_cli.schedules.schedule import Requests, trains_at_most


@trains_at_most(
    lambda iterations, epochs_per_iteration, retrain_epochs: iterations * epochs_per_iteration + retrain_epochs
)
def admm(
    problem: Problem,
    *,
    iterations: int,
    epochs_per_iteration: int,
    rho: float,
    rho_growth: float = 1.0,
    rho_max: float | None = None,
    retrain_epochs: int = 0,
) -> Requests:
    """Trains towards the projections of the weights, renews these, and in the end removes what they lack.

    Every training is one W-step, on the loss plus rho / 2 * ||W - Z + U||^2 for every constraint set; between two of
    them Z and U are renewed. The masks are chosen from W after the last.

    Args:
        problem: what is pruned; this schedule is the same for all.
        iterations: trainings with the penalty; at least 1.
        epochs_per_iteration: length of each; at least 1.
        rho: weight of the penalty in the first; above 0.
        rho_growth: factor on it from one to the next; at least 1.
        rho_max: what it grows to at most; null = without bound.
        retrain_epochs: epochs with fixed masks at the end; 0 leaves them to a finetune stage.

    Raises:
        ConfigError: values outside these ranges.
    """
    _check(iterations, epochs_per_iteration, rho, rho_growth, rho_max, retrain_epochs)
    total = iterations * epochs_per_iteration + retrain_epochs
    for iteration in range(iterations):
        yield Project(_grown(rho, rho_growth, rho_max, iteration))
        yield Train(epochs_per_iteration, total, soft=True, penalty=True)
    yield Project(_grown(rho, rho_growth, rho_max, iterations - 1))
    yield Mask()
    if retrain_epochs:
        yield Train(retrain_epochs, total)


def _grown(rho: float, growth: float, largest: float | None, times: int) -> float:
    for _ in range(times):
        rho = min(rho * growth, math.inf if largest is None else largest)
    return rho


def _check(iterations: int, epochs: int, rho: float, growth: float, largest: float | None, retrain: int) -> None:
    if iterations < 1 or epochs < 1 or retrain < 0:
        raise ConfigError(
            f"schedule: iterations and epochs_per_iteration must be at least 1 and retrain_epochs at least 0, got "
            f"{iterations}, {epochs} and {retrain}"
        )
    if not rho > 0 or not growth >= 1:
        raise ConfigError(
            f"schedule: rho={rho:g} must be above 0, as 1e-3, and rho_growth={growth:g} at least 1, which keeps rho"
        )
    if largest is not None and not largest >= rho:
        raise ConfigError(f"schedule: rho_max={largest:g} is below rho={rho:g}; give a larger one, or null")
    if not math.isfinite(_grown(rho, growth, largest, iterations - 1)):
        raise ConfigError(f"schedule: rho={rho:g} grows by {growth:g} beyond every number; give rho_max, as 0.1")
