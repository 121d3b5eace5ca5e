"""The exact optimal brain surgeon for single weights and N:M, one layer after the other, from a few images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli.criteria.statistics import Calibration
from prune_cli.errors import ConfigError
from prune_cli.granularities.element import Element
from prune_cli.granularities.n_m import NM
from prune_cli.granularities.units import Context
from prune_cli.pipeline.stage import Stage
from prune_cli.pipeline.state import Outcome, State
from prune_cli.reconstruction import layers
from prune_cli.reconstruction.layers import Moments
from prune_cli.reconstruction.surgeon import removal_losses
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import combined, keep_units
from prune_cli.session import reconstructing
from prune_cli.structure.prunable import owner

log = logging.getLogger(__name__)

LONG = 1e13  # multiply-adds of a layer's inverse Hessians, some minutes on a CPU


def check(state: State, *, granularity: Granularity) -> None:
    """Refuses what cannot be chosen layer by layer.

    Raises:
        ConfigError: says which key to change.
    """
    reconstructing.check(state)
    if granularity.budget is not None or granularity.scope == "global":
        raise ConfigError(
            f"{state.stage} chooses layer by layer: give granularity.ratio or a ratio file instead of a budget, and "
            "granularity.scope=layer"
        )
    asked, legal = _asked(state, granularity), set(layers.in_order(state.model, state.example_inputs()))
    if not asked:
        raise ConfigError(f"{state.stage}: no layer is asked to lose anything; give granularity.ratio")
    if other := [name for name in asked if name not in legal]:
        raise ConfigError(
            f"{state.stage}: {owner(other[0]) or other[0]} is no plain convolution (1-D, 2-D) or linear layer that runs once; "
            f"exclude it: granularity.rules=[{{names: [{owner(other[0])}], exclude: true}}]"
        )
    for name in asked:
        weight = state.model.get_parameter(name)
        work = float(len(weight)) * float(weight[0].numel()) ** 3
        if work > LONG:
            log.warning(
                "%s: %s has rows of %d weights; their exact inverses are %.0e multiply-adds, which may take long: exclude it "
                "in granularity.rules, or prune it by stages=[prune,reconstruct]",
                state.stage, owner(name), weight[0].numel(), work,
            )  # fmt: skip


@Stage(check=check, removes=True, reads_weights=True, granularities=(Element, NM))
def obc(
    state: State,
    *,
    granularity: Granularity,
    calibration: Calibration,
    damping: Annotated[float, Field(gt=0)] = 0.01,
) -> State:
    """Removes the weights whose loss the others of their row make up for best, and lets them (arXiv:2208.11580).

    Layers come in the order in which they run; each sees what the pruned ones before it make, and is fitted to what the
    dense network's layer makes of the same images. Nothing is trained, and no label is read.

    Args:
        granularity: element or n_m, with ratios.
        calibration: training images that are looked at.
        damping: of the Hessian's diagonal, as a fraction of its mean.
    """
    asked = _asked(state, granularity)

    def choose(name: str, module: nn.Module, moments: Moments) -> Tensor | None:
        return chosen(state, granularity, name, asked[name], module, moments, damping) if name in asked else None

    masks = reconstructing.reconstruct_layers(state, calibration, damping, choose=choose)
    mine = {name: masks[name] for name in asked if name in masks}
    units = sum(mask.numel() for mask in mine.values())
    left = sum(int(mask.sum()) for mask in mine.values())
    log.info("%s: removed %d of %d weights", state.stage, units - left, units)
    outcome = Outcome(ratio_requested=_requested(asked, mine), ratio_prunable=(units - left) / max(units, 1))
    forms = {**state.forms, **granularity.forms(state.model, mine)}
    return state.evolve(masks=masks, forms=forms, outcome=outcome)


def chosen(
    state: State,
    granularity: Granularity,
    name: str,
    ratio: float | str,
    module: nn.Module,
    moments: Moments,
    damping: float,
) -> Tensor | None:
    """The mask of one layer; None where its pattern removes nothing of it."""
    weight = module.get_parameter("weight")
    held = state.masks.get(name)
    gone = torch.zeros_like(weight, dtype=torch.bool) if held is None else ~held.to(weight.device).expand_as(weight)
    blocks, most = None, 0
    if isinstance(granularity.units, NM):
        m, n = granularity.units.patterns({name: ratio})[name]
        blocks, most = block_numbers(weight, m), m - n
    rows = layers.as_rows(module)[..., : weight[0].numel()]
    groups = gone.reshape(rows.shape)
    losses = [
        removal_losses(
            rows[g], centred(moments.gram[g], module), damping=damping, gone=groups[g], blocks=blocks, most=most
        )
        for g in range(len(rows))
    ]
    scores = torch.stack(losses).reshape(weight.shape)
    context = Context(state.model, state.example_inputs(), {name: scores}, {name: ratio}, state.masks)
    found = granularity.units.groups(context)
    keeps = keep_units(found, granularity, Fraction(1), quiet=True)
    return combined(state.model, found, keeps).get(name)


def centred(gram: Tensor, module: nn.Module) -> Tensor:
    """The gram of the weights' own inputs; where there is a bias, after it has taken the mean of what is removed."""
    if getattr(module, "bias", None) is None:
        return gram
    return gram[:-1, :-1] - gram[:-1, -1:] @ gram[-1:, :-1] / gram[-1, -1]


def block_numbers(weight: Tensor, m: int) -> Tensor:
    """Of every weight of a flattened row the number of its set of m consecutive input channels at one position."""
    inputs = torch.arange(weight.shape[1]) // m
    places = weight[0, 0].numel()
    return (inputs.unsqueeze(1) * places + torch.arange(places)).flatten().to(weight.device)


def _asked(state: State, granularity: Granularity) -> dict[str, float | str]:
    """The weights that are asked to lose something, with what they are asked for."""
    ratios = granularity.ratios(state.model)
    if isinstance(granularity.units, NM):
        return {name: ratios[name] for name in granularity.units.patterns(ratios)}
    return {name: ratio for name, ratio in ratios.items() if not isinstance(ratio, str) and ratio > 0}


def _requested(asked: Mapping[str, float | str], masks: Mapping[str, Tensor]) -> float | None:
    """The fraction that was asked for, where it is said by ratios."""
    if any(isinstance(ratio, str) for ratio in asked.values()):
        return None
    sizes = {name: mask.numel() for name, mask in masks.items()}
    return sum(float(asked[name]) * size for name, size in sizes.items()) / max(sum(sizes.values()), 1)
