"""The stage store: results by the hash of everything they depend on, shared by all runs and sweep jobs.

    STORE/<key>/            a finished stage: weights, masks, checkpoint.json, manifest.json with checksums
    STORE/<key>.partial/    the newest resumable checkpoint of an unfinished stage
    STORE/<key>.logits/     a table that saves time, see `tables`
    STORE/<key>.lock        held while a process computes the stage
    STORE/code/<...>.json   with which of our modules the newest result of a stage was computed, for messages alone
    STORE/runs/<...>.json   which run folders have referred to results, wherever they are

A folder appears under its final name only when it is complete and on the disk. What fails its checksum is deleted
and computed again, never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from prune_cli.errors import PruneError, StorageError
from prune_cli.files import artifacts
from prune_cli.files.checkpoint import FORMAT, read_checkpoint, read_manifest, write_manifest
from prune_cli.files.weights import read_state_dict, write_weights
from prune_cli.reading import read_json
from prune_cli.tensors import apart

log = logging.getLogger(__name__)

PARTIAL = ".partial"
TABLE = ".logits"
CODE = "code"
RUNS = "runs"


def default_root() -> Path:
    """Where the store lives: PRUNE_STORE, else outputs/store in the working directory."""
    return Path(os.environ.get("PRUNE_STORE") or "outputs/store").resolve()


def key_of(parent: str, *parts: Any) -> str:
    """Hex key of a stage from its parent's key and JSON-serialisable parts, the format version included."""
    text = json.dumps([FORMAT, parent, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """The libraries that a result was computed with."""
    names = ("torch", "torchvision", "numpy", "hydra-core", "safetensors", "scikit-learn")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    return found | {name: importlib.metadata.version(name) for name in names}


@dataclass(frozen=True)
class Slot:
    """Where one unfinished stage keeps its newest checkpoint."""

    folder: Path

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Replaces the checkpoint by a newer one; after a crash either the old or the new is whole."""
        count = max((int(path.name) for path in self._checkpoints()), default=-1) + 1
        target = self.folder / str(count)
        with artifacts.new_folder(target) as folder:
            write_weights(apart(tensors), folder / artifacts.WEIGHTS)
            artifacts.write_json(folder / artifacts.NUMBERS, numbers)
            write_manifest(folder, {})
        for path in self._checkpoints():
            if path != target:
                _forget(path)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or None; damaged ones are deleted."""
        for path in sorted(self._checkpoints(), key=lambda path: -int(path.name)):
            try:
                if read_manifest(path) is not None:
                    return read_state_dict(path / artifacts.WEIGHTS), read_json(path / artifacts.NUMBERS)
            except PruneError:
                log.debug("damaged", exc_info=True)
            log.warning("an unfinished checkpoint in %s is damaged and will be ignored", path)
            _forget(path)
        return None

    def clear(self) -> None:
        """Forgets the checkpoint, once the stage is finished."""
        _forget(self.folder)

    def _checkpoints(self) -> list[Path]:
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return [path for path in names if path.name.isascii() and path.name.isdecimal()]


def _forget(path: Path) -> None:
    """Deletes what is of no use any more; what cannot be deleted does no harm."""
    with suppress(OSError):
        artifacts.remove(path)


@dataclass(frozen=True)
class Store:
    """The folder of all stage results."""

    root: Path

    def find(self, key: str) -> Path | None:
        """The folder of a finished, undamaged result, or None; a damaged one is deleted.

        Raises:
            StorageError: a damaged one cannot be deleted, so that a new one could not take its place.
        """
        folder = self.root / key
        if not os.path.lexists(folder):
            return None
        if why := _damage(folder, key):
            log.warning("the stored stage %s is damaged (%s); it will be computed again", key, why)
            with artifacts.writing(folder):
                artifacts.remove(folder)
            return None
        with suppress(OSError):  # another user's, perhaps
            os.utime(folder)  # what is in use is young
        return folder

    def slot(self, key: str) -> Slot:
        """The place for the checkpoints of a stage that is being computed."""
        return Slot(self.root / f"{key}{PARTIAL}")

    @contextmanager
    def lock(self, key: str, what: str) -> Iterator[None]:
        """Holds a stage, so that it is computed once; waits for another process that has it."""
        with artifacts.writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("%s: another process is computing it; waiting", what)
                lock.acquire()
        try:
            self._clean(key)
            yield
        finally:
            lock.release()

    def _clean(self, key: str) -> None:
        """Takes away, under the lock, what a killed process left half written, and what stands in the way."""
        slot = self.slot(key).folder
        with artifacts.writing(self.root):
            if slot.is_symlink() or (slot.exists() and not slot.is_dir()):
                log.warning("%s is no folder; it is deleted, as checkpoints go there", slot)
                artifacts.remove(slot)
            for path in [*self.root.glob(f".{key}.*"), *slot.glob(".*")]:
                artifacts.remove(path)

    def put(self, key: str, write: Callable[[Path], None]) -> Path:
        """Adds a finished result: `write` fills a folder that then appears under the key in one rename."""
        with artifacts.new_folder(self.root / key) as folder:
            write(folder)
            write_manifest(folder, {"key": key, "versions": versions()})
        self.slot(key).clear()
        return self.root / key

    def note_code(self, meaning: str, key: str, code: Mapping[str, str]) -> None:
        """Remembers with which of our modules a result was computed, under the part of its key without them."""
        try:
            artifacts.write_json(self._code(meaning), {"key": key, "code": dict(code)})
        except StorageError as error:  # the result itself is stored
            log.warning("the store does not remember the code of a result: %s", error)

    def code_of(self, meaning: str) -> dict[str, str] | None:
        """The modules of the newest result that differs from this one in our code at most; None where there is none."""
        try:
            code = read_json(self._code(meaning)).get("code")
        except PruneError:
            return None
        return {str(name): str(value) for name, value in code.items()} if isinstance(code, dict) else None

    def _code(self, meaning: str) -> Path:
        return self.root / CODE / f"{meaning}.json"

    def refer(self, run: Path) -> None:
        """Remembers that a run folder refers to results, so that `sweepable` asks it wherever that is called from.

        Raises:
            StorageError: it cannot be written down.
        """
        note = self.root / RUNS / f"{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:32]}.json"
        if not note.is_file():
            artifacts.write_json(note, {"folder": str(run.resolve())})

    def referring(self) -> list[Path]:
        """The run folders that have referred to results and are still there; notes of others are forgotten."""
        found = []
        for note in sorted((self.root / RUNS).glob("*.json")):
            try:
                folder = Path(str(read_json(note).get("folder")))
            except PruneError:
                folder = Path()
            if folder.is_absolute() and folder.is_dir():
                found.append(folder)
            else:
                note.unlink(missing_ok=True)
        return found

    def entries(self) -> list[Path]:
        """All finished results, damaged ones too."""
        if not self.root.is_dir():
            return []
        hidden = (CODE, RUNS)
        return sorted(
            path for path in self.root.iterdir() if path.is_dir() and not path.suffix and path.name not in hidden
        )

    def sweepable(self, used: Collection[str], young: float) -> list[Leftover]:
        """What no run needs: results that are not in `used`, damaged ones, and checkpoints and half-written folders.

        What was made or taken within the last `young` seconds stays, and what a process is computing, and results of
        which a run folder somewhere still has the files as hard links: without them no byte would be freed.
        """
        found = []
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            key = path.name.lstrip(".").split(".")[0]
            if path.suffix == ".lock" or path.name in (CODE, RUNS):
                continue
            finished = path.name == key
            damage = _damage(path, key) if finished else ""
            needed = finished and not damage and (key in used or _is_linked(path))
            if needed or time.time() - path.lstat().st_mtime < young or self._is_held(key):
                continue
            unneeded = (
                "a table that can be computed again" if path.suffix == TABLE else "a leftover of a run that ended"
            )
            why = damage or ("no run folder refers to it" if finished else unneeded)
            found.append(Leftover(path, key, size(path), why))
        return found

    def sweep(self, leftovers: Collection[Leftover]) -> int:
        """Deletes leftovers that no process has begun to use since they were found.

        Returns:
            how many went.

        Raises:
            StorageError: one cannot be deleted.
        """
        count = 0
        for one in leftovers:
            lock = FileLock(self.root / f"{one.key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            with artifacts.writing(one.path):
                artifacts.remove(one.path)
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
            count += 1
        for note in (self.root / CODE).glob("*.json"):
            if not (self.root / (_key_in(note) or "gone")).is_dir():
                note.unlink(missing_ok=True)
        return count

    def _is_held(self, key: str) -> bool:
        """Whether a process is computing this stage."""
        path = self.root / f"{key}.lock"
        if not path.is_file():
            return False
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False


@dataclass(frozen=True)
class Leftover:
    """Something in the store that no run needs, its size in bytes, and why it is not needed."""

    path: Path
    key: str
    bytes: int
    why: str


def _damage(folder: Path, key: str) -> str:
    """What is wrong with a stored result; empty where it is whole."""
    if not folder.is_dir():
        return "it is no folder"
    if (manifest := read_manifest(folder)) is None:
        return "a checksum differs"
    if manifest.get("key") != key:
        return "it is the result of another stage"
    try:
        read_checkpoint(folder)
    except PruneError as error:
        return str(error)
    return ""


def _is_linked(folder: Path) -> bool:
    """Whether a folder outside the store has the same files."""
    return any(path.is_file() and path.stat().st_nlink > 1 for path in folder.iterdir())


def _key_in(note: Path) -> str | None:
    """The key of the result that a note is about; None where it is damaged."""
    try:
        key = read_json(note).get("key")
    except PruneError:
        return None
    return key if isinstance(key, str) and key.isalnum() else None


def size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir())
