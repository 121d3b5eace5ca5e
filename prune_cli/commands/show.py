"""`prune show recipe=NAME [overrides] [--estimate]`: what a recipe would do, without doing it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from prune_cli.config.compose import compose, require_recipe

if TYPE_CHECKING:
    from prune_cli.pipeline.state import State
    from prune_cli.pipeline.step import Pipeline, Step
    from prune_cli.training.training import Training

HELP = """usage: prune show recipe=NAME [key=value ...] [--estimate]

Prints the composed config with a comment per key, the stages in order, the data's counts and the network's params and MACs, after all
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

    from prune_cli.config.option_files import commented
    from prune_cli.console import Console, count
    from prune_cli.measure import cost as measure
    from prune_cli.pipeline import build
    from prune_cli.pipeline.store import Store, default_root

    sys.stdout.write(commented(composed.config, composed.choices) + "\n")
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


def _facts(step: Step, state: State) -> str:
    """One line on a stage: its length and, where it prunes, how many units it would remove."""
    from prune_cli.selection.granularity import Granularity

    parts = [length] if (length := _length(step, state)) else []
    for asked in (value for value in step.parameters.values() if isinstance(value, Granularity)):
        ratios, budget = asked.ratios(state.model), asked.budget
        sizes = (f"{name}: {ratio}" for name, ratio in ratios.items())
        what = f"until {budget.quantity}={float(budget.target)}" if budget else " | ".join(sizes)
        parts.append(f"{len(ratios)} layers, {what}")
    return "; ".join(parts) or "no training"


def _length(step: Step, state: State) -> str:
    if step.training is None or step.epochs == 0:
        return ""
    steps = len(state.data.train(step.training.batch_size, 0))
    return f"{'some' if step.epochs is None else step.epochs} epochs of {steps} steps"


def _estimate(built: Pipeline) -> None:
    """Times one training batch of every stage that trains, and prints steps, disk and time."""
    from prune_cli.console import clock
    from prune_cli.measure.cost import cost as count_cost

    total, disk = 0.0, 0
    bytes_per_stage = count_cost(built.state.model, built.state.example_inputs(), {}).bytes
    for step in built.steps:
        disk += bytes_per_stage
        if step.training is None or step.epochs is None:
            length = "no training" if step.training is None else "trains as long as its schedule decides to"
            sys.stdout.write(f"estimate {step.name}: {length}\n")
            continue
        steps = step.epochs * len(built.state.data.train(step.training.batch_size, 0))
        seconds = steps * seconds_per_step(step.training, built.state) if steps else 0.0
        total += seconds
        sys.stdout.write(f"estimate {step.name}: {step.epochs} epochs, {steps} steps, {clock(seconds)}\n")
    sys.stdout.write(f"estimate in all: {clock(total)} of training on {built.state.device}, {disk / 1e6:.1f} MB kept\n")


def seconds_per_step(training: Training, state: State) -> float:
    """Seconds of one forward and backward pass on a batch of the training, after one to warm up, on a copy of the network."""
    import copy

    import torch
    from torch.nn import functional as F

    model = copy.deepcopy(state.model).train()
    images, labels = next(iter(state.data.train(training.batch_size, 0).epoch(0)))
    for _ in range(2):
        began = time.perf_counter()
        F.cross_entropy(model(images), labels).backward()
        if state.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - began
