"""Shrinking the network of a state, and the way back for stages that need plain layers."""

from __future__ import annotations

import logging
from collections.abc import Callable

from prune_cli import masks as masking
from prune_cli.granularities.units import Units
from prune_cli.pipeline.state import State
from prune_cli.structure import rebuild
from prune_cli.structure.plan import Plan
from prune_cli.structure.verified import Small, shrink

log = logging.getLogger(__name__)

CHECKED = 4  # images on which the shrunk network must agree with the masked one


def shrink_state(state: State, units: Units, plan: Callable[[], Plan] | None = None) -> State:
    """The state with the masked units taken out; masked and shrunk network must agree on calibration images."""
    small = taken_out(state, units, plan)
    lineage = small.lineage.after(state.lineage) if state.lineage else small.lineage
    return state.evolve(model=small.model, masks=small.masks, lineage=lineage)


def taken_out(state: State, units: Units, plan: Callable[[], Plan] | None = None) -> Small:
    """The network of a state without its masked units, checked on calibration images.

    Its lineage begins at the state's network, whatever was done to that before.

    Args:
        plan: gives the channel plan of the network, where somebody keeps it.
    """
    assert units.shrinks, "checked before anything was trained"
    masking.apply(state.model, state.masks)
    images = [image[None] for batch, _ in state.data.calibration(CHECKED, CHECKED) for image in batch]
    small = shrink(
        units,
        state.model,
        state.example_inputs(),
        state.masks,
        check_on=images[:CHECKED],
        plan=plan,
    )
    before, after = (sum(p.numel() for p in model.parameters()) for model in (state.model, small.model))
    log.info("%s: shrunk from %d to %d params", state.stage, before, after)
    return small


def expanded(state: State) -> State:
    """The state with plain layers and masks in place of closed ones (stripes): what a stage that chooses weights can
    work on."""
    if state.lineage is None:
        return state
    model, masks, lineage = rebuild.expanded(state.model, state.masks, state.lineage)
    return state.evolve(model=model, masks=masks, lineage=lineage)
