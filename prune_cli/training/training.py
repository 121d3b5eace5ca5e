"""How a stage trains, as one value that is passed whole."""

from __future__ import annotations

from dataclasses import dataclass

from prune_cli.training.fit import BatchSize, LrSchedule, OptimizerFactory, Options, Smoothing


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train; how long, with which loss and under which masks is the stage's own.

    In a recipe its fields are keys of the stage: `finetune.batch_size`, `finetune.optimizer.lr`, `finetune.fit.ema`.

    Attributes:
        batch_size: images per step, of all processes together.
        optimizer: makes the optimizer from the trainable parameters.
        lr_schedule: (epochs done, epochs) -> factor on the optimizer's learning rate.
        label_smoothing: fraction of the target spread over all classes, in [0, 1).
        fit: arithmetic, averaging, selection and checkpoints; see `Options`.
    """

    batch_size: BatchSize
    optimizer: OptimizerFactory
    lr_schedule: LrSchedule
    label_smoothing: Smoothing = 0.0
    fit: Options
