"""Soft pruning at intervals, then training with fixed masks (DNN-Model-Prune; soft phase as in arXiv:1808.06866)."""

from __future__ import annotations

from prune_cli.errors import ConfigError
from prune_cli.schedules.requests import Done, Mask, Memo, Request, Train


def iterative(
    memo: Memo | None, *, epochs: int, retrain_epoch: int, prune_freq: int, start: int = 0
) -> tuple[Memo, Request]:
    """Masks every `prune_freq` epochs and lets pruned weights regrow, then fixes the mask and trains with it.

    Args:
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
    if memo is None and start:
        return {"epoch": start, "masked": False}, Train(start, epochs, enforce=False)
    epoch, masked = (memo["epoch"], memo["masked"]) if memo else (0, False)
    if not masked:
        return {"epoch": epoch, "masked": True}, Mask(monotone=False)
    if epoch < retrain_epoch:
        until = min(epoch + prune_freq, retrain_epoch)
        return {"epoch": until, "masked": False}, Train(until, epochs, enforce=False)
    if epoch < epochs:
        return {"epoch": epochs, "masked": True}, Train(epochs, epochs)
    return memo or {}, Done()
