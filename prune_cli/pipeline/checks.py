"""What is refused of any stage before training, from what the stage declares."""

from __future__ import annotations

import copy
import inspect

import torch

from prune_cli.errors import ConfigError, first_line
from prune_cli.pipeline.stage import Parameters, Stage, training_of
from prune_cli.pipeline.state import State
from prune_cli.selection.granularity import Granularity
from prune_cli.training.fit import OptimizerFactory, Options


def check_stage(state: State, stage: Stage, parameters: Parameters) -> State:
    """Checks a stage by its declaration, then by its own `check`.

    Args:
        state: as it will enter the stage, as far as earlier stages' checks know.

    Returns:
        the state for the checks of later stages.

    Raises:
        ConfigError: says which key to change.
    """
    check_granularities(state, stage, parameters)
    if (training := training_of(parameters)) is not None:
        check_optimizer(state, training.optimizer)
        check_options(state, training.fit)
        if stage.trains(parameters) != 0:
            check_last_batch(state, training.batch_size)
    if stage.check is None:
        return state
    wanted = inspect.signature(stage.check).parameters
    return stage.check(state, **{name: value for name, value in parameters.items() if name in wanted}) or state


def check_granularities(state: State, stage: Stage, parameters: Parameters) -> None:
    """Refuses units that the stage is not made for.

    Raises:
        ConfigError: which to choose.
    """
    made_for = " or ".join(units.name for units in stage.granularities)
    for value in parameters.values():
        if made_for and isinstance(value, Granularity) and not isinstance(value.units, stage.granularities):
            raise ConfigError(
                f"{state.stage} is for {made_for}, not for {type(value.units).__name__}; choose granularity={made_for}"
            )


def check_optimizer(state: State, optimizer: OptimizerFactory) -> None:
    """Refuses settings that the optimizer does not take.

    Raises:
        ConfigError: what it says.
    """
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{state.stage}.optimizer: {error}") from error


def check_options(state: State, options: Options) -> None:
    """Refuses selection on a split that does not exist.

    Raises:
        ConfigError: says which key to change.
    """
    if options.select_on == "val" and not state.data.has_val:
        raise ConfigError(
            f"{state.stage}.fit.select_on=val, but dataset.val=0 leaves nothing to select on; "
            "set dataset.val to a fraction, or select_on=last"
        )
    if options.early_stop is not None and not state.data.has_val and options.select_on != "test":
        raise ConfigError(f"{state.stage}.fit.early_stop needs a validation split; set dataset.val to a fraction")


def check_last_batch(state: State, batch_size: int) -> None:
    """Refuses a batch of a single image where the network cannot train on one, as batch norms of 1x1 maps.

    Raises:
        ConfigError: which key to change.
    """
    batches = state.data.train(batch_size, 0)
    if len(batches) == 0 or batches.size(len(batches) - 1) != 1:
        return
    try:
        with torch.no_grad():
            copy.deepcopy(state.model).train()(state.example_inputs())
    except ValueError as error:
        raise ConfigError(
            f"{state.stage}.batch_size={batch_size} leaves one image of {state.data.sizes['train']} for the last batch, "
            f"on which model={state.architecture.name} cannot train ({first_line(error)}); choose another"
        ) from error
