"""A better order of channels before N:M pruning: the same function, more magnitude kept."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

from pydantic import Field

from prune_cli.errors import ConfigError
from prune_cli.files import artifacts
from prune_cli.granularities.n_m import NM
from prune_cli.permutation import network
from prune_cli.pipeline.stage import Stage
from prune_cli.pipeline.state import Outcome, State
from prune_cli.selection.granularity import Granularity
from prune_cli.structure.follow import analyse

TABLE = "permutation.csv"

log = logging.getLogger(__name__)


def check(state: State, *, granularity: Granularity) -> None:
    """Refuses a network that an earlier stage will have shrunk.

    Raises:
        ConfigError: says which key to change.
    """
    if state.shrunk_by is not None:
        raise _shrunk(state, state.shrunk_by)
    _patterns(state, granularity)


@Stage(check=check, reads_weights=True, granularities=(NM,))
def permute(
    state: State, *, granularity: Granularity, window: Literal[0, 8, 12], escapes: Annotated[int, Field(ge=0)]
) -> State:
    """Reorders coupled channels so that N:M keeps more magnitude (Pool and Yu, NeurIPS 2021).

    What every layer keeps before and after is in permutation.csv.

    Args:
        granularity: n_m; its ratios or patterns say which weights count.
        window: columns that are repartitioned exhaustively at a time; 0 = greedy swaps only.
        escapes: times that each search leaves a local optimum at random.
    """
    if state.lineage:
        raise _shrunk(state, "an earlier stage")
    patterns = _patterns(state, granularity)
    plan = analyse(state.model, state.example_inputs())
    done = network.permute(state.model, plan, patterns, window=window, escapes=escapes, seed=state.stage_seed % 2**62)
    for layer in done.layers:
        log.info(
            "%s: %s m%dn%d keeps %.6g, before %.6g (efficacy %.1f %%)",
            state.stage, layer.name, layer.m, layer.n, layer.after, layer.before, layer.efficacy,
        )  # fmt: skip
    outcome = Outcome(files={TABLE: artifacts.table(network.Layer, done.layers)})
    return state.evolve(masks=network.permute_masks(state.masks, done.moves), outcome=outcome)


def _shrunk(state: State, earlier: str) -> ConfigError:
    return ConfigError(
        f"{state.stage}: {earlier} makes the network smaller than the dense one, and what it keeps is recorded in the "
        f"order of channels; put {state.stage} before it"
    )


def _patterns(state: State, granularity: Granularity) -> dict[str, tuple[int, int]]:
    assert isinstance(granularity.units, NM), "the stage declares it"
    return granularity.units.patterns(granularity.ratios(state.model))
