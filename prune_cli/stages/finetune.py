"""Recovery after pruning: training under fixed masks, with or without a teacher."""

from __future__ import annotations

from prune_cli.distillation.distillation import Distillation
from prune_cli.pipeline.state import State
from prune_cli.stages import learning, teaching
from prune_cli.training.fit import BatchSize, Epochs, LrSchedule, OptimizerFactory, Options, Smoothing


def finetune(
    state: State,
    *,
    epochs: Epochs,
    batch_size: BatchSize,
    optimizer: OptimizerFactory,
    lr_schedule: LrSchedule,
    distillation: Distillation,
    label_smoothing: Smoothing = 0.0,
    fit: Options,
) -> State:
    """Trains the pruned network; masked weights stay exactly zero after every step.

    Args:
        epochs: passes over the training split.
        batch_size: images per step.
        label_smoothing: fraction of the target spread over all classes, in [0, 1).
    """
    return learning.trained(
        state,
        teaching.objective(state, distillation, label_smoothing),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        options=fit,
    )


def check(state: State, *, distillation: Distillation, fit: Options) -> None:
    """Refuses options that this dataset cannot serve, and a teacher that will not be there."""
    learning.check_options(state, fit)
    teaching.check(state, distillation)
