"""Stripe pruning while training: the learned filter skeleton (Meng et al., arXiv:2009.14410, section 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Annotated

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_cli import masks as masking
from prune_cli.config.nodes import Flat
from prune_cli.criteria import sites
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.granularities.stripe import Stripe
from prune_cli.granularities.units import Context
from prune_cli.pipeline import shrinking
from prune_cli.pipeline.stage import Stage, own_epochs
from prune_cli.pipeline.state import Outcome, State
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.ranking import smallest
from prune_cli.session import learning, teaching
from prune_cli.training import filter_skeleton as method
from prune_cli.training.fit import Epochs
from prune_cli.training.training import Training

log = logging.getLogger(__name__)


def check(
    state: State,
    *,
    granularity: Granularity,
    alpha: float,
    threshold: float,
    norm_scale: float | None = None,
    training: Training,
    distillation: Distillation,
) -> State:
    """Refuses impossible strengths and selection of an epoch that has other masks than the last.

    Returns:
        the state as later stages will find it: it says whether the network is smaller then.

    Raises:
        ConfigError: says which key to change.
    """
    teaching.check(state, distillation)
    _least(state, granularity)
    if norm_scale is not None and norm_scale <= 0:
        raise ConfigError(f"{state.stage}.norm_scale={norm_scale:g} must be above 0, as 0.5, or null")
    if alpha < 0 or not 0 <= threshold < 1:
        raise ConfigError(
            f"{state.stage}: alpha={alpha:g} must not be negative and threshold={threshold:g} must be in [0, 1), "
            "because strengths begin at 1"
        )
    if training.fit.select_on != "last" or training.fit.ema is not None:
        raise ConfigError(f"{state.stage}.fit: stripes die until the last epoch; choose select_on=last and ema=null")
    return state.evolve(shrunk_by=state.stage) if granularity.shrink else state


@Stage(check=check, trains=own_epochs, removes=True, reads_weights=True, granularities=(Stripe,))
def skeleton(
    state: State,
    *,
    granularity: Granularity,
    alpha: float,
    threshold: float,
    norm_scale: float | None = None,
    epochs: Epochs,
    training: Annotated[Training, Flat()],
    distillation: Distillation,
) -> State:
    """Trains weights and stripes together; what dies on the way is the mask. No fine-tuning is needed afterwards.

    Masks that hold already are not enforced while it trains, and hold again afterwards.

    Args:
        granularity: stripe; its rules say which layers get a skeleton, its `min_keep` and `max_ratio` how many stripes
            of a layer stay however weak they are (at least one), `shrink` whether the network is made of what is left.
            The ratio does not count: alpha decides.
        alpha: weight of the penalty on the stripes' strengths, 1e-5 on CIFAR, 5e-6 to 2e-5 on ImageNet.
        threshold: strength at which a stripe dies, 0.01 in the released commands.
        norm_scale: what the scales of all batch norms begin with, 0.5 in the released code, for training from scratch;
            None leaves them as they are.
        epochs: passes over the training split.
    """
    least = _least(state, granularity)
    names = list(least)
    constants = _constants(state, names)
    if norm_scale is not None:
        for module in state.model.modules():
            if isinstance(module, _BatchNorm) and module.weight is not None:
                nn.init.constant_(module.weight, norm_scale)
    method.attach(state.model, names)
    progress = learning.learn(
        state,
        teaching.objective(state, distillation, training, epochs),
        epochs=epochs,
        training=training,
        regularise=method.Shrinkage(state.model, names, alpha, threshold, constants, least),
        progress=learning.resumed(state, training.optimizer),
    )
    masks = method.detach(state.model, names, threshold, constants, least)
    units = sum(masks[name].numel() for name in names)
    removed = units - sum(int(masks[name].sum()) for name in names)
    log.info("%s: removed %d of %d stripes", state.stage, removed, units)
    outcome = Outcome(
        epochs=progress.epoch,
        select_on=training.fit.select_on,
        ratio_prunable=removed / max(units, 1),
        history=tuple(progress.history),
    )
    forms = {**granularity.forms(state.model, masks), **state.forms}
    masks = granularity.complete(state.model, state.example_inputs(), masking.joined(state.masks, masks))
    after = state.evolve(masks=masks, forms=forms, outcome=outcome)
    return shrinking.shrink_state(after, granularity.units) if granularity.shrink else after


def _least(state: State, granularity: Granularity) -> dict[str, int]:
    """The weights that get a skeleton, and how many of their stripes always stay."""
    asked = granularity.ratios(state.model)
    blank = {name: torch.zeros(()).expand(state.model.get_parameter(name).shape) for name in asked}
    groups = granularity.units.groups(Context(state.model, state.example_inputs(), blank, asked, {}))
    most = smallest(groups, granularity.limits)
    return {group.name: group.scores.numel() - count for group, count in zip(groups, most, strict=True)}


def _constants(state: State, names: Iterable[str]) -> dict[str, list[str]]:
    """The layer's bias and the parameters of the norm behind it, by name of the weight."""
    parameters = dict(state.model.named_parameters())
    found = sites.find(state.model.eval(), state.example_inputs())
    return {
        name: [
            parameter
            for parameter in (name.removesuffix("weight") + "bias", *(found.norm_of(name) or ()))
            if parameter in parameters
        ]
        for name in names
    }
