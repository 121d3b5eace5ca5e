"""Shrinking the network of a state, and the way back for stages that need plain layers."""

from __future__ import annotations

import logging

from prune_cli import masks as masking
from prune_cli.pipeline.state import State
from prune_cli.structure import rebuild
from prune_cli.structure.verified import Shrinks, shrink

log = logging.getLogger(__name__)

CHECKED = 4  # images on which the shrunk network must agree with the masked one


def shrink_state(state: State, units: object) -> State:
    """The state with the masked units taken out; masked and shrunk network must agree on calibration images."""
    assert isinstance(units, Shrinks), "checked before anything was trained"
    masking.apply(state.model, state.masks)
    images = [image[None] for batch, _ in state.data.calibration(CHECKED, CHECKED) for image in batch]
    small = shrink(
        units,
        state.model,
        state.example_inputs(),
        state.masks,
        lineage=state.lineage,
        check_on=images[:CHECKED],
    )
    before, after = (sum(p.numel() for p in model.parameters()) for model in (state.model, small.model))
    log.info("%s: shrunk from %d to %d params", state.stage, before, after)
    return state.evolve(model=small.model, masks=small.masks, lineage=small.lineage)


def expanded(state: State) -> State:
    """The state with plain layers and masks in place of closed ones (stripes): what a stage that chooses weights can
    work on."""
    if state.lineage is None:
        return state
    model, masks, lineage = rebuild.expanded(state.model, state.masks, state.lineage)
    return state.evolve(model=model, masks=masks, lineage=lineage)
