"""Large tables in the store that are only there to save time: a teacher's logits of every training image.

    STORE/<key>.logits/     the rows so far, as a checkpoint with checksums; all of them when it is finished

Who is killed while computing one goes on from the rows that are there. What is damaged is computed again. Together they take
at most `MOST` bytes: the ones that were not used for longest go.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from prune_cli.errors import Interrupted, StorageError
from prune_cli.files import artifacts
from prune_cli.pipeline.store import TABLE, Leftover, Slot, Store, size

log = logging.getLogger(__name__)

MOST = 2 << 30
"""Bytes of all tables in a store."""

SECONDS = 30.0  # between two writings of an unfinished table

_NAME = "logits"


def table(
    store: Store,
    key: str,
    shape: tuple[int, int],
    parts: Callable[[int], Iterator[Tensor]],
    *,
    what: str,
    stop: Callable[[], bool],
) -> Tensor:
    """A table of float32 numbers, from the store or else computed and kept there; of two processes one computes it.

    Args:
        key: of all that its numbers depend on.
        shape: rows and columns.
        parts: (first row) -> all rows from there on, a few at a time; cut anywhere, the same ones.
        what: for messages.
        stop: asked after every part.

    Raises:
        Interrupted: the user asked to stop; the rows so far are kept.
    """
    slot = Slot(store.root / f"{key}{TABLE}")
    with store.lock(key, what):
        for leftover in slot.folder.glob(".*"):
            artifacts.remove(leftover)
        whole, done = _begun(slot, shape)
        if done == len(whole):
            log.info("%s: taken from the store", what)
            with suppress(OSError):  # another user's, perhaps
                os.utime(slot.folder)  # what is in use is young
            return whole
        log.info("%s: computing %d rows, once for all runs", what, len(whole) - done)
        saved = time.monotonic()
        for part in parts(done):
            whole[done : done + len(part)] = part
            done += len(part)
            stopping = stop()
            if done < len(whole) and (stopping or time.monotonic() - saved >= SECONDS):
                _keep(slot, whole[:done], what)
                saved = time.monotonic()
            if stopping:
                raise Interrupted(f"stopped while computing {what}; the same command goes on there")
        _make_room(store, key, whole.nbytes)
        _keep(slot, whole, what)
    return whole


def _begun(slot: Slot, shape: tuple[int, int]) -> tuple[Tensor, int]:
    """The table with the rows that an earlier process left, and how many these are."""
    found = slot.load()
    rows = found[0].get(_NAME) if found else None
    if rows is None or rows.dtype != torch.float32 or rows.shape[1:] != shape[1:] or len(rows) > shape[0]:
        return torch.empty(shape), 0
    if len(rows) == shape[0]:
        return rows, shape[0]
    whole = torch.empty(shape)
    whole[: len(rows)] = rows
    return whole, len(rows)


def _keep(slot: Slot, rows: Tensor, what: str) -> None:
    """Writes rows down; a disk that is full costs time only."""
    try:
        slot.save({_NAME: rows}, {"rows": len(rows)})
    except StorageError as error:
        log.warning("%s: not kept, so that the next run computes it again: %s", what, error)


def _make_room(store: Store, key: str, wanted: int) -> None:
    """Deletes the tables that were not used for longest, until there is room for another."""
    others = [path for path in store.root.glob(f"*{TABLE}") if path.name != f"{key}{TABLE}"]
    dated = sorted((path.lstat().st_mtime, path) for path in others if os.path.lexists(path))
    held = {path: size(path) for _, path in dated}
    for _, path in dated:
        if sum(held.values()) + wanted <= MOST:
            return
        if store.sweep([Leftover(path, path.name.removesuffix(TABLE), held[path], "room for a newer table")]):
            held.pop(path)
