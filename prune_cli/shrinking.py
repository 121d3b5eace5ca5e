"""From masks to a network that is really smaller, checked against the masked one, and back where masks are needed.

The masks say which units are gone; the granularity's units know how to take them out. What comes back computes what
the masked network computes, or it is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prune_cli import masked, stripe_conv
from prune_cli import masks as masking
from prune_cli.errors import SurgeryError
from prune_cli.masks import Masks
from prune_cli.measure import evaluating
from prune_cli.plan import Plan
from prune_cli.state import State
from prune_cli.stripe_conv import StripeConv2d
from prune_cli.surgery import Lineage, Shrunk

log = logging.getLogger(__name__)

CHECKED = 4  # images on which the shrunk network must agree with the masked one
TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output: rounding in float32 stays far below."""


@runtime_checkable
class Shrinks(Protocol):
    """Units of a granularity that can be taken out of a network, not only masked."""

    def shrink(
        self, model: nn.Module, example_inputs: Any, masks: Masks, plan: Callable[[], Plan] | None = None
    ) -> Shrunk:
        """The network without the units that the masks remove; `plan` gives its channel plan, where somebody keeps it."""


@dataclass(frozen=True)
class Small:
    """A shrunk network.

    Attributes:
        model: the new module.
        masks: what the masks still remove inside the smaller tensors; empty where whole units were all they removed.
        lineage: how it descends from the dense network, over all rounds.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    lineage: Lineage


def shrink(
    units: Shrinks,
    model: nn.Module,
    example_inputs: Any,
    masks: Masks,
    *,
    lineage: Lineage | None = None,
    check_on: Iterable[Any] = (),
    plan: Callable[[], Plan] | None = None,
) -> Small:
    """Takes the masked units out of a network whose masked entries are zero.

    Args:
        units: the granularity that made the masks.
        model: the masked network; left as it was.
        example_inputs: inputs for the analysis of shapes.
        masks: parameter name -> bool tensor, True = keep.
        lineage: how `model` descends from the dense network; None = it is the dense network.
        check_on: inputs, shaped like the example, on which masked and shrunk network must agree. Norms over
            channels (LayerNorm, GroupNorm) are compared over the kept channels.
        plan: gives the channel plan of `model`, where somebody keeps it.

    Raises:
        SurgeryError: the two do not agree, or the network cannot be analysed.
    """
    shrunk = units.shrink(model, example_inputs, masks, plan)
    return checked(model, shrunk, masks, lineage=lineage, check_on=check_on)


def checked(
    model: nn.Module,
    shrunk: Shrunk,
    masks: Masks,
    *,
    lineage: Lineage | None = None,
    check_on: Iterable[Any] = (),
) -> Small:
    """What surgery made of a network, after a look at whether the two agree; see `shrink`.

    Raises:
        SurgeryError: they do not.
    """
    with evaluating(model), evaluating(shrunk.model):
        for inputs in check_on:
            _agree(model, shrunk, inputs)
    left = {name: _left(name, mask, shrunk) for name, mask in masks.items()}
    whole = shrunk.lineage if lineage is None else shrunk.lineage.after(lineage)
    return Small(shrunk.model, {name: mask for name, mask in left.items() if not bool(mask.all())}, whole)


def shrink_state(state: State, units: object, plan: Callable[[], Plan] | None = None) -> State:
    """The state with the masked units taken out; masked and shrunk network must agree on calibration images."""
    small = taken_out(state, units, plan)
    first = composed(state.lineage)
    lineage = small.lineage if first is None else small.lineage.after(first)
    return state.evolve(model=small.model, masks=small.masks, lineage=lineage.to_dict())


def taken_out(state: State, units: object, plan: Callable[[], Plan] | None = None) -> Small:
    """The network of a state without its masked units, checked on calibration images.

    Its lineage begins at the state's network, whatever was done to that before.

    Args:
        plan: gives the channel plan of the network, where somebody keeps it.
    """
    assert isinstance(units, Shrinks), "checked before anything was trained"
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


def _agree(model: nn.Module, shrunk: Shrunk, inputs: Any) -> None:
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            worst = masked.difference(model, shrunk, inputs)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise SurgeryError(
            f"the shrunk network does not run ({' '.join(str(error).split())[:200]}); keep the masks "
            "(granularity.shrink=false) and report the network"
        ) from error
    log.debug("masked and shrunk network differ by %.1e of the largest output", worst)
    if not worst <= TOLERANCE:  # nan too
        raise SurgeryError(
            f"the shrunk network differs from the masked one by {worst:.1e} of the largest output; "
            "keep the masks (granularity.shrink=false) and report the network"
        )


def _left(name: str, mask: Tensor, shrunk: Shrunk) -> Tensor:
    """A mask in the shape of the parameter of the smaller network."""
    mask = masking.sliced(mask, shrunk.lineage.kept.get(name, {}))
    layer = shrunk.model.get_submodule(name.rpartition(".")[0])
    if not isinstance(layer, StripeConv2d) or not name.endswith("weight"):
        return mask
    return layer.rows(mask.expand(layer.out_channels, layer.weight.shape[1], *layer.kernel_size))


def expanded(state: State) -> State:
    """The state with plain convolutions and masks in place of stripes: what a stage that chooses weights can work on."""
    lineage = composed(state.lineage)
    if lineage is None or not lineage.stripes:
        return state
    model, masks = stripe_conv.expanded(state.model, state.masks)
    return state.evolve(model=model, masks=masks, lineage=lineage.without_stripes().to_dict())


def composed(lineage: Mapping[str, Any] | None) -> Lineage | None:
    """The lineage of a `State`, which keeps it as JSON data."""
    return None if lineage is None else Lineage.from_dict(lineage)
