"""The layers' ratios searched by the samplers of Optuna (Akiba et al., arXiv:1907.10902), by ask and tell."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from prune_cli.errors import ScheduleError
from prune_cli.schedules.choices import countable, scaled
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import ACCEPTED, Evaluate, Judge, Kept, Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most, tries_at_most

Sampler = Literal["tpe", "cma_es", "nsga2", "random"]
Objective = Literal["score", "cost"]

COST = "cost"  # the parameter that says what a choice may cost, beside those of the groups
MIDDLE, SPREAD = 0.5, 0.2  # where CMA-ES begins: as annealing does, and how far it looks


@trains_at_most(lambda epochs: epochs, tries=True)
@tries_at_most(lambda candidates: candidates)
def optuna_search(
    problem: Problem,
    *,
    candidates: Annotated[int, Field(ge=2)] = 200,
    sampler: Sampler = "tpe",
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("score",),
    cheapest: Annotated[float, Field(gt=0, le=1)] = 0.5,
    population: Annotated[int, Field(ge=2)] = 20,
    short_epochs: Annotated[int, Field(ge=0)] = 0,
    epochs: Annotated[int, Field(ge=0)] = 0,
) -> Requests:
    """Asks a sampler for a fraction of each group and tells it the score; then removes what the best of them say.

    A choice is brought to what it may cost as in annealing, by scaling what goes; the first takes the same fraction of every
    group. With the objective `cost` the sampler also says what a choice may cost, between `cheapest` and everything. The
    best is that of the highest score within the budget; front.csv has the others.

    Args:
        problem: what is pruned.
        candidates: choices that are scored, in all.
        sampler: `tpe`, `cma_es` (one objective), `nsga2` or `random`.
        objectives: `score` alone, or `score` and `cost`.
        cheapest: with two objectives, the least that a choice may cost, as a fraction of the budget.
        population: of `nsga2`.
        short_epochs: epochs that each candidate trains before it is scored; 0 = norm statistics alone.
        epochs: epochs with the masks at the end.

    Raises:
        ScheduleError: Optuna is not installed, the sampler has one objective alone, or the budget lies below what floors
            allow.
    """
    countable(problem, "optuna")
    both = COST in objectives
    if "score" not in objectives or len(set(objectives)) < len(objectives):
        raise ScheduleError("schedule.objectives: give [score] or [score,cost]")
    if both and sampler == "cma_es":
        raise ScheduleError("schedule.sampler=cma_es has one objective; choose tpe or nsga2, or objectives=[score]")
    names = [group.name for group in problem.groups]
    study, space = _study(problem, sampler, both, candidates, population, cheapest)
    tried: list[tuple[float, float, Kept]] = []
    for _ in range(candidates):
        trial = study.ask(space)
        goal = np.array([trial.params[name] for name in names])
        whole = problem.cost(problem.whole)
        kept = scaled(problem, goal, allowed=max(trial.params[COST] * whole, _floor(problem)) if both else None)
        (score,) = yield Evaluate([kept], train=short_epochs)
        cost = problem.cost(kept)
        yield Judge([_verdict(score, cost, tried, both)])
        tried.append((score, cost, kept))
        study.tell(trial, [score, cost / whole] if both else score)
    within = [one for one in tried if one[1] <= problem.budget]
    yield Mask(kept=max(within, key=lambda one: one[0])[2])
    if epochs:
        yield Train(epochs)


def _verdict(score: float, cost: float, tried: Sequence[tuple[float, float, Kept]], both: bool) -> str:
    """`accepted` for the best so far, or for what none so far beats in both objectives."""
    better = [one for one in tried if (one[0] >= score and one[1] <= cost if both else one[0] >= score)]
    if not better:
        return ACCEPTED
    best = max(better, key=lambda one: one[0])
    return f"{best[0]:.4g} % were found at {best[1]:.6g}" if both else f"{best[0]:.4g} % is the best so far"


def _floor(problem: Problem) -> float:
    """What is left when every group is at its floor."""
    return problem.cost(problem.counts(dict.fromkeys(problem.whole, 0.0)))


def _study(
    problem: Problem, sampler: Sampler, both: bool, candidates: int, population: int, cheapest: float
) -> tuple[Any, dict[str, Any]]:
    """A study in memory with a seeded sampler, and what it has to choose.

    Raises:
        ScheduleError: a package is missing.
    """
    for package in ("optuna", *(["cmaes"] if sampler == "cma_es" else [])):
        if importlib.util.find_spec(package) is None:
            raise ScheduleError(f"schedule=optuna needs the package {package}: pip install 'prune-cli[search]'")
    optuna = importlib.import_module("optuna")  # only where it is asked for: it takes a second
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = int(problem.generator("optuna").integers(2**31))
    begin: dict[str, Any] = dict.fromkeys(problem.whole, MIDDLE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of their options are called experimental
        made = {
            "tpe": lambda: optuna.samplers.TPESampler(
                seed=seed, multivariate=True, n_startup_trials=max(candidates // 10, 2)
            ),
            "cma_es": lambda: optuna.samplers.CmaEsSampler(
                seed=seed, x0=begin, sigma0=SPREAD, warn_independent_sampling=False
            ),
            "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=population),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }[sampler]()
    floats = optuna.distributions.FloatDistribution
    space = {name: floats(0.0, 1.0) for name in problem.whole}
    first = dict(begin)
    if both:
        space[COST] = floats(min(cheapest * problem.remains, 1.0), 1.0)
        first[COST] = problem.remains
    study = optuna.create_study(sampler=made, directions=["maximize", "minimize"] if both else ["maximize"])
    study.enqueue_trial(first)
    return study, space
