"""Shrinking the network of a state, its lineage, and the way back for stages that need plain layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from prune_cli import masks as masking
from prune_cli.granularities.units import Units
from prune_cli.layers import replacing
from prune_cli.pipeline.state import State
from prune_cli.structure.lineage import Lineage
from prune_cli.structure.verified import shrink

log = logging.getLogger(__name__)

CHECKED = 4  # images on which the shrunk network must agree with the masked one


def shrink_state(state: State, units: Units) -> State:
    """The state with the masked units taken out; masked and shrunk network must agree on calibration images."""
    assert units.shrinks, "checked before anything was trained"
    masking.apply(state.model, state.masks)
    images = [image[None] for batch, _ in state.data.calibration(CHECKED, CHECKED) for image in batch]
    small = shrink(
        units,
        state.model,
        state.example_inputs(),
        state.masks,
        lineage=composed(state.lineage),
        check_on=images[:CHECKED],
    )
    before, after = (sum(p.numel() for p in model.parameters()) for model in (state.model, small.model))
    log.info("%s: shrunk from %d to %d params", state.stage, before, after)
    return state.evolve(model=small.model, masks=small.masks, lineage=small.lineage.to_dict())


def expanded(state: State) -> State:
    """The state with plain convolutions and masks in place of stripes: what a stage that chooses weights can work on."""
    lineage = composed(state.lineage)
    if lineage is None or not lineage.stripes:
        return state
    model, masks = replacing.expanded(state.model, state.masks)
    return state.evolve(model=model, masks=masks, lineage=lineage.without_stripes().to_dict())


def composed(lineage: Mapping[str, Any] | None) -> Lineage | None:
    """The lineage of a `State`, which keeps it as JSON data."""
    return None if lineage is None else Lineage.from_dict(lineage)
