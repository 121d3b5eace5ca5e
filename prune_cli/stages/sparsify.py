"""Training with a penalty that prepares a network for pruning: what will go is pushed towards zero beforehand."""

from __future__ import annotations

from dataclasses import replace

from prune_cli.pipeline.state import State
from prune_cli.regularisers.penalty import Regulariser
from prune_cli.stages import learning
from prune_cli.training.fit import BatchSize, Epochs, LrSchedule, OptimizerFactory, Options, Smoothing


def sparsify(
    state: State,
    *,
    regulariser: Regulariser,
    epochs: Epochs,
    batch_size: BatchSize,
    optimizer: OptimizerFactory,
    lr_schedule: LrSchedule,
    label_smoothing: Smoothing = 0.0,
    fit: Options,
) -> State:
    """Minimises cross entropy plus a regulariser's penalty, whose gradient is added before every optimizer step.

    Args:
        regulariser: (network, one image) -> penalty.
        epochs: passes over the training split.
        batch_size: images per step.
        label_smoothing: fraction of the target spread over all classes, in [0, 1).
    """

    penalty = regulariser(state.model, state.example_inputs())  # of the network as it came, also when going on
    after = learning.trained(
        state,
        learning.cross_entropy(label_smoothing),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        options=fit,
        regularise=penalty.add,
    )
    return after.evolve(outcome=replace(after.outcome, sparse_norms=penalty.norms))


def check(state: State, *, regulariser: Regulariser, fit: Options) -> State:
    """Refuses networks that the regulariser cannot serve, and options that this dataset cannot.

    Returns:
        the state as later stages will find it: it says which norms are sparse then.

    Raises:
        ConfigError: there is nothing to push towards zero.
    """
    learning.check_options(state, fit)
    return state.evolve(sparse_norms=regulariser(state.model, state.example_inputs()).norms)
