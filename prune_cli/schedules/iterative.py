"""Soft pruning at intervals, then training with fixed masks (DNN-Model-Prune; soft phase as in arXiv:1808.06866)."""

from __future__ import annotations

from prune_cli.errors import ConfigError
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask, Train
from prune_cli.schedules.schedule import Requests, trains_at_most


@trains_at_most(lambda epochs: epochs)
def iterative(problem: Problem, *, epochs: int, retrain_epoch: int, prune_freq: int, start: int = 0) -> Requests:
    """Masks every `prune_freq` epochs and lets pruned weights regrow, then fixes the mask and trains with it.

    Args:
        problem: what is pruned; this schedule is the same for all.
        epochs: length of the whole stage.
        retrain_epoch: epochs of the soft phase, the epoch from which the mask is fixed; in [0, epochs].
        prune_freq: epochs between two mask updates in the soft phase; at least 1.
        start: epoch of the first mask, before which the network trains as it is; in [0, retrain_epoch].

    Raises:
        ConfigError: values outside these ranges.
    """
    if not 0 <= retrain_epoch <= epochs or prune_freq < 1:
        raise ConfigError(
            f"schedule: retrain_epoch must be in [0, epochs={epochs}] and prune_freq at least 1, "
            f"got {retrain_epoch} and {prune_freq}"
        )
    if not 0 <= start <= retrain_epoch:
        raise ConfigError(f"schedule: start must be in [0, retrain_epoch={retrain_epoch}], got {start}")
    if start:
        yield Train(start, epochs, soft=True)
    for epoch in range(start, retrain_epoch, prune_freq):
        yield Mask(monotone=False, soft=True)
        yield Train(min(prune_freq, retrain_epoch - epoch), epochs, soft=True)
    yield Mask(monotone=False)
    if retrain_epoch < epochs:
        yield Train(epochs - retrain_epoch, epochs)
