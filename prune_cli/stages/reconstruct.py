"""What is left of a pruned network, fitted to the dense network's outputs: no labels, no gradients, few images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prune_cli.criteria.statistics import Calibration
from prune_cli.errors import ConfigError
from prune_cli.pipeline.stage import Stage
from prune_cli.pipeline.state import Outcome, State
from prune_cli.session import reconstructing


def check(state: State) -> None:
    """Refuses to reconstruct what nothing was removed from.

    Raises:
        ConfigError: says what would be right.
    """
    if state.dense is None:
        raise ConfigError(f"{state.stage}: nothing was pruned before it; put it behind prune (stages=[...])")
    reconstructing.check(state)


@Stage(check=check, reads_weights=True)
def reconstruct(state: State, *, calibration: Calibration, damping: Annotated[float, Field(ge=0)] = 0.01) -> State:
    """Gives every layer, in the order in which they run, the weights that come nearest to the dense network's outputs.

    A layer sees the inputs that the layers before it make now, and is fitted by least squares to the outputs that the
    same layer of the dense network has for the same images; weights that were removed stay removed, and biases are
    fitted too. For the masks of single weights this is the update of the optimal brain surgeon (arXiv:2208.11580); for
    filters it is the reconstruction of channel pruning (arXiv:1707.06168, equation 4).

    Args:
        calibration: training images that are looked at, without their labels.
        damping: pull towards the weights as they are, as a fraction of the mean square of a layer's inputs.
    """
    masks = reconstructing.reconstruct_layers(state, calibration, damping)
    return state.evolve(masks=masks, outcome=Outcome())
