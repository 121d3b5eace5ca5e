"""Recovery after pruning: training under fixed masks, with or without a teacher."""

from __future__ import annotations

from typing import Annotated

from prune_cli.config.nodes import Flat
from prune_cli.distillation.distillation import Distillation
from prune_cli.pipeline.stage import Stage, own_epochs
from prune_cli.pipeline.state import State
from prune_cli.session import learning, teaching
from prune_cli.training.fit import Epochs
from prune_cli.training.training import Training


def check(state: State, *, distillation: Distillation) -> None:
    """Refuses a teacher that will not be there."""
    teaching.check(state, distillation)


@Stage(check=check, trains=own_epochs)
def finetune(
    state: State,
    *,
    epochs: Epochs,
    training: Annotated[Training, Flat()],
    distillation: Distillation,
) -> State:
    """Trains the pruned network; masked weights stay exactly zero after every step.

    Args:
        epochs: passes over the training split.
    """
    return learning.trained(
        state,
        teaching.objective(state, distillation, training, epochs),
        epochs=epochs,
        training=training,
    )
