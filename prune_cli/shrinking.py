"""From masks to a network that is really smaller, checked against the masked one.

The masks say which units are gone; the granularity's units know how to take them out. What comes back computes what
the masked network computes, or it is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prune_cli import masked
from prune_cli.errors import SurgeryError
from prune_cli.masks import Masks
from prune_cli.measure import evaluating
from prune_cli.surgery import Lineage, Shrunk

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output: rounding in float32 stays far below."""


@runtime_checkable
class Shrinks(Protocol):
    """Units of a granularity that can be taken out of a network, not only masked."""

    def shrink(self, model: nn.Module, example_inputs: Any, masks: Masks) -> Shrunk:
        """The network without the units that the masks remove."""


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

    Raises:
        SurgeryError: the two do not agree, or the network cannot be analysed.
    """
    shrunk = units.shrink(model, example_inputs, masks)
    with evaluating(model), evaluating(shrunk.model):
        for inputs in check_on:
            _agree(model, shrunk, inputs)
    left = {name: _sliced(mask, model.get_parameter(name), shrunk.lineage, name) for name, mask in masks.items()}
    whole = shrunk.lineage if lineage is None else shrunk.lineage.after(lineage)
    return Small(shrunk.model, {name: mask for name, mask in left.items() if not bool(mask.all())}, whole)


def _agree(model: nn.Module, shrunk: Shrunk, inputs: Any) -> None:
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        worst = masked.difference(model, shrunk, inputs)
    log.debug("masked and shrunk network differ by %.1e of the largest output", worst)
    if not worst <= TOLERANCE:  # nan too
        raise SurgeryError(
            f"the shrunk network differs from the masked one by {worst:.1e} of the largest output; "
            "keep the masks (granularity.shrink=false) and report the network"
        )


def _sliced(mask: Tensor, parameter: Tensor, lineage: Lineage, name: str) -> Tensor:
    """A mask in the shape of the smaller parameter; axes that it spreads over stay spread."""
    for axis, indices in lineage.kept.get(name, {}).items():
        if mask.shape[axis - parameter.dim()] > 1:
            mask = mask.index_select(axis - parameter.dim(), torch.tensor(indices, device=mask.device))
    return mask


def composed(lineage: Mapping[str, Any] | None) -> Lineage | None:
    """The lineage of a `State`, which keeps it as JSON data."""
    return None if lineage is None else Lineage.from_dict(lineage)
