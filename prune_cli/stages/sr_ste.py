"""Training towards N:M from dense weights: the mask follows the weights until the end (SR-STE, arXiv:2102.04010)."""

from __future__ import annotations

import logging
from typing import Annotated

from prune_cli.config.nodes import Flat
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.granularities.n_m import NM
from prune_cli.pipeline.stage import Stage, own_epochs
from prune_cli.pipeline.state import Outcome, State
from prune_cli.selection.granularity import Granularity
from prune_cli.session import learning, teaching
from prune_cli.training import sr_ste as method
from prune_cli.training.fit import Epochs
from prune_cli.training.training import Training

log = logging.getLogger(__name__)


def check(state: State, *, granularity: Granularity, decay: float, distillation: Distillation) -> None:
    """Refuses networks without N:M layers and a decay that would not decay.

    Raises:
        ConfigError: says which key to change.
    """
    teaching.check(state, distillation)
    _patterns(state, granularity)
    if decay < 0:
        raise ConfigError(f"{state.stage}.decay={decay:g} would make masked weights grow; give 0 or more, as 2e-4")


@Stage(check=check, trains=own_epochs, removes=True, reads_weights=True, granularities=(NM,))
def sr_ste(
    state: State,
    *,
    granularity: Granularity,
    decay: float,
    epochs: Epochs,
    training: Annotated[Training, Flat()],
    distillation: Distillation,
) -> State:
    """Trains the N:M projection of the weights, then fixes it.

    Masks that hold already are not enforced: the projection takes their place.

    Args:
        granularity: n_m; its ratios or patterns say which weights are projected how.
        decay: pull of masked weights towards zero, 2e-4 in the paper.
        epochs: passes over the training split.
    """
    patterns = _patterns(state, granularity)
    method.attach(state.model, patterns, decay)
    progress = learning.learn(
        state,
        teaching.objective(state, distillation, training, epochs),
        epochs=epochs,
        training=training,
        progress=learning.resumed(state, training.optimizer),
    )
    masks = method.detach(state.model, patterns)
    units = sum(mask.numel() for mask in masks.values())
    removed = units - sum(int(mask.sum()) for mask in masks.values())
    outcome = Outcome(
        epochs=progress.epoch,
        select_on=training.fit.select_on,
        ratio_requested=sum((1 - n / m) * masks[name].numel() for name, (m, n) in patterns.items()) / max(units, 1),
        ratio_prunable=removed / max(units, 1),
        history=tuple(progress.history),
    )
    log.info("%s: removed %d of %d weights", state.stage, removed, units)
    forms = {**state.forms, **granularity.forms(state.model, masks)}
    return state.evolve(masks={**state.masks, **masks}, forms=forms, outcome=outcome)


def _patterns(state: State, granularity: Granularity) -> dict[str, tuple[int, int]]:
    assert isinstance(granularity.units, NM), "the stage declares it"
    patterns = granularity.units.patterns(granularity.ratios(state.model))
    if not patterns:
        raise ConfigError(
            f"{state.stage}: no layer is asked for N:M; give granularity.ratio or patterns in a ratio file"
        )
    return patterns
