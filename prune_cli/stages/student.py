"""Another network goes on in the place of the one that came, which becomes its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch

from prune_cli.config.nodes import Whole, validate
from prune_cli.errors import ConfigError
from prune_cli.files.weights import load_weights
from prune_cli.pipeline.loading import build_architecture
from prune_cli.pipeline.stage import Parameters, Stage
from prune_cli.pipeline.state import Outcome, State

Network = Annotated[Mapping[str, Any], Whole()]
"""A node of the group `model`."""


def check(state: State, *, network: Network) -> State:
    """Refuses a network that does not fit the data.

    Returns:
        the state as later stages will find it.

    Raises:
        ConfigError: it cannot be built, or gives no logit per class.
    """
    after = student(state, network=network)
    with torch.no_grad():
        found = after.model(state.example_inputs())
    if not isinstance(found, torch.Tensor) or found.dim() != 2 or found.shape[1] < state.data.num_classes:
        raise ConfigError(f"{state.stage}.network: it must return (batch, {state.data.num_classes}), a logit per class")
    return after.evolve(shrunk_by=None)


def becomes(state: State, parameters: Parameters) -> State:
    """The state with the student's architecture: of the network that came, nothing that was masked or remembered is left."""
    node = parameters["network"]
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise ConfigError(
            f"{state.stage}.network: needs an option of the group model: model@{state.stage}.network=NAME"
        )
    name = str(node["_target_"]).rpartition(".")[2]
    architecture = build_architecture(node, state.data, name, state.seed)
    return state.evolve(architecture=architecture, masks={}, forms={}, lineage=None, remembered={}, sparse_norms=None)


@Stage(check=check, removes=True, becomes=becomes)
def student(state: State, *, network: Network) -> State:
    """Goes on with a network of its own weights; the one that came is `teacher: dense` from here on.

    Args:
        network: how to build it, and a file of weights that it may have.
    """
    after = becomes(state, {"network": network})
    model = after.architecture.build()
    if weights := network.get("weights"):
        load_weights(model, validate(weights, f"{state.stage}.network.weights", Path))
    return after.evolve(model=model.to(state.device).eval(), outcome=Outcome())
