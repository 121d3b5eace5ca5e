"""`prune show recipe=NAME [overrides] [--estimate] [--config]`: what a recipe would do, without doing it."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from prune_cli.config.compose import Composed, compose, require_recipe
from prune_cli.config.locations import description, options
from prune_cli.errors import CheckpointError, ConfigError, DataError, nearest

if TYPE_CHECKING:
    from prune_cli.pipeline.step import Pipeline, Step

HELP = """usage: prune show recipe=NAME [key=value ...] [--estimate] [--config]

Prints the config of the stages that run with a comment per key, the data's counts, the network's params and MACs, and the
stages in order, after all checks that `prune run` makes before training. Where the data or pretrained weights are not here,
it says so and goes by the dataset's published size.

  --estimate  a summary alone: stages, steps, time, disk and memory, from a few timed images per stage
  --config    the whole config, also of what does not run
"""

FLAGS = ("--estimate", "--config")


def main(arguments: list[str]) -> int:
    """Composes, builds and prints."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    estimate, whole = (flag in arguments for flag in FLAGS)
    overrides = [argument for argument in arguments if argument not in FLAGS]
    if unknown := [word for word in overrides if word.startswith("-")]:
        raise ConfigError(f"prune show: there is no option {unknown[0]!r}{nearest(unknown[0], FLAGS)}")
    require_recipe(overrides)
    composed = compose(overrides)

    from prune_cli.config.option_files import commented
    from prune_cli.console import listen

    listen(logging.WARNING)
    config = composed.config if whole else running(composed.config)
    if not estimate:
        sys.stdout.write(commented(config, composed.choices) + "\n")
    built, missing = _built(composed)
    lines = summary(built, composed, missing, timed=estimate)
    sys.stdout.write("\n".join(lines) + "\n")
    if estimate and whole:
        sys.stdout.write("\n" + commented(config, composed.choices) + "\n")
    sys.stdout.flush()
    return 0


def running(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the nodes of stages that do not run, and without options that no stage uses that does."""
    named = config.get("stages")
    stages = [name for name in config if isinstance(config[name], dict) and isinstance(named, list) and name in named]
    used = {key for stage in stages for key in config[stage]} | {"model", "dataset"}
    nodes = {key for key, node in config.items() if isinstance(node, dict)}
    return {key: value for key, value in config.items() if key not in nodes or key in stages or key in used}


def _built(composed: Composed) -> tuple[Pipeline, str]:
    """The pipeline, and what is not here; without it, made-up images or weights stand in.

    Raises:
        PruneError: what `prune run` would refuse besides missing files.
    """
    from prune_cli.console import Console
    from prune_cli.pipeline import build
    from prune_cli.pipeline.store import Store, default_root

    def built(config: dict[str, Any]) -> Pipeline:
        return build.build(config, composed.choices, Console(), Store(default_root()))

    config, missing = composed.config, ""
    try:
        return built(config), missing
    except DataError as error:
        if config["dataset"].get("fake") is not False:
            raise
        missing, config = str(error), config | {"dataset": config["dataset"] | {"fake": True}}
    except CheckpointError as error:
        if not config["model"].get("pretrained"):
            raise
        missing, config = str(error), config | {"model": config["model"] | {"pretrained": False}}
    return built(config), missing


def summary(built: Pipeline, composed: Composed, missing: str, *, timed: bool) -> list[str]:
    """The lines on a pipeline: what it starts from, its stages and, where `timed`, what it costs."""
    from prune_cli.console import count
    from prune_cli.measure import cost as measure

    state, choices = built.state, composed.choices
    recipe, data = choices.get("recipe", ""), state.data
    path = options("recipe").get(recipe)
    cost = measure.cost(state.model, state.example_inputs(), state.masks)
    published = getattr(data, "published", None)
    sizes = dict(published if missing and published else data.sizes)
    if missing and data.sizes != sizes:
        missing = f"the size is the published one, as the images are not here: {missing}"
    elif missing:
        missing = f"made-up ones stand in for what is not here: {missing}"
    counted = ", ".join(f"{number} {split}" for split, number in sizes.items())
    lines = [
        f"recipe   {recipe}: {description(path) if path else ''}",
        f"dataset  {choices.get('dataset')}: {data.num_classes} classes of {' x '.join(map(str, data.shape))}; {counted}",
        f"model    {choices.get('model')}: {count(cost.params)} params, {count(cost.macs)} MACs, {cost.bytes / 1e6:.1f} MB",
    ]
    if missing:
        lines.append(f"note     {missing}")
    if timed:
        from prune_cli.commands.estimate import estimate

        return [*lines, *estimate(built, sizes, composed.config), *_next(recipe)]
    steps = enumerate(built.steps, 1)
    return lines + [f"stage {n}  {step.name}: {_facts(step, built, sizes, composed.config)}" for n, step in steps]


def _next(recipe: str) -> list[str]:
    return [f"next     prune run recipe={recipe}", f"         prune show recipe={recipe}  # every key of what runs"]


def _facts(step: Step, built: Pipeline, sizes: dict[str, int], config: dict[str, Any]) -> str:
    """One line on a stage: its length and, where it prunes, how many units it would remove."""
    from prune_cli.selection.granularity import Granularity

    steps = steps_per_epoch(step, sizes, config)
    parts = [f"{'some' if step.epochs is None else step.epochs} epochs of {steps} steps"] if steps else []
    for asked in (value for value in step.parameters.values() if isinstance(value, Granularity)):
        ratios, budget = asked.ratios(built.state.model), asked.budget
        what = f"until {budget.quantity}={float(budget.target)}" if budget else _ratios(ratios)
        parts.append(f"{len(ratios)} layers, {what}")
    return "; ".join(parts) or "no training"


def _ratios(ratios: dict[str, float | str]) -> str:
    """The ratios of layers: one where all have the same."""
    if len(set(ratios.values())) == 1:
        return f"ratio {next(iter(ratios.values()))}"
    return " | ".join(f"{name}: {ratio}" for name, ratio in ratios.items())


def steps_per_epoch(step: Step, sizes: dict[str, int], config: dict[str, Any]) -> int:
    """Training steps of one epoch; 0 where the stage does not train."""
    from prune_cli.data.splits import steps

    if step.training is None or step.epochs == 0:
        return 0
    return steps(sizes["train"], step.training.batch_size, config.get("limit_batches"))
