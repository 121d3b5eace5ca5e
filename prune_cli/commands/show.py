"""`prune show recipe=NAME [overrides] [--estimate]`: what a recipe would do, without doing it."""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

from prune_cli.config.compose import compose, require_recipe

HELP = """usage: prune show recipe=NAME [key=value ...] [--estimate]

Prints the composed config, the stages in order, the data's counts and the network's params and MACs, after all
checks that `prune run` makes before training. --estimate adds steps, disk and time, from one timed batch per stage.
"""


def main(arguments: list[str]) -> int:
    """Composes, builds and prints."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    estimate = "--estimate" in arguments
    overrides = [argument for argument in arguments if argument != "--estimate"]
    require_recipe(overrides)
    composed = compose(overrides)

    import yaml

    from prune_cli.console import Console, count
    from prune_cli.measure import cost as measure
    from prune_cli.pipeline import build
    from prune_cli.pipeline.store import Store, default_root

    sys.stdout.write(yaml.safe_dump(composed.config, sort_keys=False) + "\n")
    store = Store(default_root())
    built = build.build(composed.config, composed.choices, Console(), store)
    state = built.state
    data = state.data
    cost = measure.cost(state.model, state.example_inputs(), state.masks)
    shape = " x ".join(str(size) for size in data.shape)
    sizes = ", ".join(f"{number} {split}" for split, number in data.sizes.items())
    sys.stdout.write(f"dataset  {composed.choices.get('dataset')}: {data.num_classes} classes of {shape}; {sizes}\n")
    sys.stdout.write(
        f"model    {composed.choices.get('model')}: {count(cost.params)} params, {count(cost.macs)} MACs, "
        f"{cost.bytes / 1e6:.1f} MB\n"
    )
    for number, step in enumerate(built.steps, 1):
        sys.stdout.write(f"stage {number}  {step.name}: {_facts(step, state)}\n")
    if estimate:
        _estimate(built)
    return 0


def _facts(step: Any, state: Any) -> str:
    """One line on a stage: its length and, where it prunes, how many units it would remove."""
    keywords = step.run.keywords if isinstance(step.run, functools.partial) else {}
    parts = []
    if "epochs" in keywords:
        steps = len(state.data.train(keywords["batch_size"], 0))
        parts.append(f"{keywords['epochs']} epochs of {steps} steps")
    if "granularity" in keywords:
        asked, budget = keywords["granularity"].ratios(state.model), keywords["granularity"].budget
        sizes = (f"{name}: {ratio}" for name, ratio in asked.items())
        what = f"until {budget.quantity}={float(budget.target)}" if budget else " | ".join(sizes)
        parts.append(f"{len(asked)} layers, {what}")
    return "; ".join(parts) or "no training"


def _estimate(built: Any) -> None:
    """Times one training batch of every stage that trains, and prints steps, disk and time."""
    from prune_cli.console import clock
    from prune_cli.measure.cost import cost as count_cost

    total, disk = 0.0, 0
    bytes_per_stage = count_cost(built.state.model, built.state.example_inputs(), {}).bytes
    for step in built.steps:
        epochs, steps = stage_length(step, built.state)
        disk += bytes_per_stage
        if epochs is None:
            sys.stdout.write(f"estimate {step.name}: as many epochs of {steps} steps as its schedule finds it needs\n")
            continue
        seconds = epochs * steps * seconds_per_step(step, built.state) if epochs else 0.0
        total += seconds
        sys.stdout.write(f"estimate {step.name}: {epochs} epochs, {epochs * steps} steps, {clock(seconds)}\n")
    sys.stdout.write(f"estimate in all: {clock(total)} of training on {built.state.device}, {disk / 1e6:.1f} MB kept\n")


def stage_length(step: Any, state: Any) -> tuple[int | None, int]:
    """Epochs and steps per epoch of a stage; a pruning stage trains at most as long as its schedule says, if it does."""
    from prune_cli.schedules.schedule import most_epochs

    keywords = step.run.keywords
    epochs = most_epochs(keywords["schedule"]) if "schedule" in keywords else int(keywords.get("epochs", 0))
    return epochs, len(state.data.train(keywords["batch_size"], 0))


def seconds_per_step(step: Any, state: Any) -> float:
    """Seconds of one forward and backward pass on the stage's batch, after one to warm up, on a copy of the network."""
    import copy

    import torch
    from torch.nn import functional as F

    model = copy.deepcopy(state.model).train()
    images, labels = next(iter(state.data.train(step.run.keywords["batch_size"], 0).epoch(0)))
    for _ in range(2):
        began = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        if state.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - began
