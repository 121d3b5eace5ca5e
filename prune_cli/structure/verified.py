"""From masks to a network that is really smaller, checked against the masked one, and back where masks are needed.

The masks say which units are gone; the granularity's units know how to take them out. What comes back computes what
the masked network computes, or it is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.errors import SurgeryError
from prune_cli.layers.replacing import kind_named
from prune_cli.masks import Masks
from prune_cli.structure import reference
from prune_cli.structure.lineage import Lineage
from prune_cli.structure.modes import evaluating
from prune_cli.structure.plan import Plan
from prune_cli.structure.surgery import Shrunk

log = logging.getLogger(__name__)
TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output: rounding in float32 stays far below."""


class Shrinks(Protocol):
    """Units of a granularity that can be taken out of a network; those that can declare it."""

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
    known = () if plan is None else (plan,)
    shrunk = units.shrink(model, example_inputs, masks, *known)
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
    left = _left(masks, shrunk)
    whole = shrunk.lineage if lineage is None else shrunk.lineage.after(lineage)
    return Small(shrunk.model, {name: mask for name, mask in left.items() if not bool(mask.all())}, whole)


def _agree(model: nn.Module, shrunk: Shrunk, inputs: Any) -> None:
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            worst = reference.difference(model, shrunk, inputs)
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


def _left(masks: Masks, shrunk: Shrunk) -> dict[str, Tensor]:
    """The masks in the shapes of the parameters of the smaller network."""
    kept = shrunk.lineage.kept
    left = {name: masking.sliced(mask, kept.get(name, {})) for name, mask in masks.items()}
    for module, one in shrunk.lineage.replaced.items():
        own = {name: left.pop(name) for name in list(left) if name.startswith(f"{module}.")}
        inside = {name[len(module) + 1 :]: mask for name, mask in own.items()}
        inside = kind_named(one.kind).masks_left(shrunk.model.get_submodule(module), inside)
        left |= {f"{module}.{name}": mask for name, mask in inside.items()}
    return left
