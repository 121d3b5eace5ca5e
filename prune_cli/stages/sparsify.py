"""Training with a penalty that prepares a network for pruning: what will go is pushed towards zero beforehand."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from prune_cli.config.nodes import Flat
from prune_cli.pipeline.stage import Stage, own_epochs
from prune_cli.pipeline.state import State
from prune_cli.regularisers.penalty import Regulariser
from prune_cli.session import learning
from prune_cli.training.fit import Epochs
from prune_cli.training.training import Training


def check(state: State, *, regulariser: Regulariser) -> State:
    """Refuses networks that the regulariser cannot serve.

    Returns:
        the state as later stages will find it: it says which norms are sparse then.

    Raises:
        ConfigError: there is nothing to push towards zero.
    """
    return state.evolve(sparse_norms=regulariser(state.model, state.example_inputs()).norms)


@Stage(check=check, trains=own_epochs, reads_weights=True)
def sparsify(
    state: State,
    *,
    regulariser: Regulariser,
    epochs: Epochs,
    training: Annotated[Training, Flat()],
) -> State:
    """Minimises cross entropy plus a regulariser's penalty, whose gradient is added before every optimizer step.

    Args:
        regulariser: (network, one image) -> penalty.
        epochs: passes over the training split.
    """

    penalty = regulariser(state.model, state.example_inputs())  # of the network as it came, also when going on
    after = learning.trained(
        state,
        learning.cross_entropy(training.label_smoothing),
        epochs=epochs,
        training=training,
        regularise=penalty.add,
    )
    return after.evolve(outcome=replace(after.outcome, sparse_norms=penalty.norms))
