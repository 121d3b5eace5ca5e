"""Norm statistics of a pruned network, estimated again without touching a weight."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prune_cli.errors import ConfigError
from prune_cli.pipeline.stage import Stage
from prune_cli.pipeline.state import Outcome, State
from prune_cli.training.batch_norm import has_statistics, recalibrate_bn
from prune_cli.training.fit import BatchSize


def check(state: State) -> None:
    """Refuses networks without statistics.

    Raises:
        ConfigError: there is nothing to estimate.
    """
    if not has_statistics(state.model):
        raise ConfigError(
            f"{state.stage}: model={state.architecture.name} has no batch norms with running statistics; "
            "leave the stage out (stages=[...])"
        )


@Stage(check=check)
def recalibrate(state: State, *, images: Annotated[int, Field(ge=1)], batch_size: BatchSize) -> State:
    """Replaces every batch norm's running statistics by their mean over training images (EagleEye, arXiv:2007.02491).

    Args:
        images: training images, without augmentation; all of them where there are fewer.
        batch_size: images per forward pass; each batch counts the same.
    """
    recalibrate_bn(state.model, state.data.calibration(images, batch_size))
    return state.evolve(outcome=Outcome())
