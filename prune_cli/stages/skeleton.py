"""Stripe pruning while training: the learned filter skeleton (Meng et al., arXiv:2009.14410, section 3.2)."""

from __future__ import annotations

import logging

from prune_cli import skeleton as method
from prune_cli.criteria import sites
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.fit import LrSchedule, OptimizerFactory, Options
from prune_cli.granularities.granularity import Granularity
from prune_cli.granularities.spatial import fitting, many_positions
from prune_cli.granularities.stripe import NEEDS, Stripe
from prune_cli.stages import learning
from prune_cli.state import Outcome, State

log = logging.getLogger(__name__)


def skeleton(
    state: State,
    *,
    granularity: Granularity,
    alpha: float,
    threshold: float,
    epochs: int,
    batch_size: int,
    optimizer: OptimizerFactory,
    lr_schedule: LrSchedule,
    distillation: Distillation,
    label_smoothing: float = 0.0,
    fit: Options,
) -> State:
    """Trains weights and stripes together; what dies on the way is the mask. No fine-tuning is needed afterwards.

    Args:
        granularity: stripe; its rules say which layers get a skeleton. The ratio does not count: alpha decides.
        alpha: weight of the penalty on the stripes' strengths, 1e-5 on CIFAR, 5e-6 to 2e-5 on ImageNet.
        threshold: strength at which a stripe dies, 0.01 in the released commands.
        epochs: passes over the training split.
        batch_size: images per step.
        label_smoothing: share of the target spread over all classes, in [0, 1).
    """
    names = _names(state, granularity)
    found = sites.find(state.model.eval(), state.example_inputs())
    norms = {name: pair for name in names if (pair := found.norm_of(name)) is not None}
    method.attach(state.model, names)
    progress = learning.learn(
        state,
        learning.objective(state, distillation, label_smoothing),
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        options=fit,
        regularise=method.Shrinkage(state.model, names, alpha, threshold, norms),
        progress=learning.resumed(state, optimizer),
    )
    masks = method.detach(state.model, names, threshold, norms)
    units = sum(masks[name].numel() for name in names)
    removed = units - sum(int(masks[name].sum()) for name in names)
    log.info("%s: removed %d of %d stripes", state.stage, removed, units)
    outcome = Outcome(
        epochs=progress.epoch,
        select_on=fit.select_on,
        ratio_prunable=removed / max(units, 1),
        history=tuple(progress.history),
    )
    forms = {**state.forms, **granularity.forms(state.model, masks)}
    return state.evolve(masks={**state.masks, **masks}, forms=forms, outcome=outcome)


def _names(state: State, granularity: Granularity) -> list[str]:
    if not isinstance(granularity.units, Stripe):
        raise ConfigError(f"{state.stage} learns stripes; choose granularity=stripe")
    return list(fitting(state.model, granularity.ratios(state.model), many_positions, "stripe", NEEDS))


def check(
    state: State,
    *,
    granularity: Granularity,
    alpha: float,
    threshold: float,
    distillation: Distillation,
    fit: Options,
) -> None:
    """Refuses other granularities, impossible strengths and selection of an epoch that has other masks than the last.

    Raises:
        ConfigError: says which key to change.
    """
    learning.check_options(state, fit)
    learning.check_teacher(state, distillation)
    _names(state, granularity)
    if alpha < 0 or not 0 <= threshold < 1:
        raise ConfigError(
            f"{state.stage}: alpha={alpha:g} must not be negative and threshold={threshold:g} must be in [0, 1), "
            "because strengths begin at 1"
        )
    if fit.select_on != "last" or fit.ema is not None:
        raise ConfigError(f"{state.stage}.fit: stripes die until the last epoch; choose select_on=last and ema=null")
