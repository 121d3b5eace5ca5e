"""The stage store: results by the hash of everything they depend on, shared by all runs and sweep jobs.

    STORE/<key>/            a finished stage: weights, masks, checkpoint.json, manifest.json with checksums
    STORE/<key>.partial/    the newest resumable checkpoint of an unfinished stage
    STORE/<key>.lock        held while a process computes the stage
    STORE/code/<...>.json   with which of our modules the newest result of a stage was computed, for messages alone

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
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from prune_cli.errors import CheckpointError
from prune_cli.files import artifacts
from prune_cli.files.weights import read_state_dict, write_weights
from prune_cli.hashing import file_sha256

log = logging.getLogger(__name__)

FORMAT = 1
PARTIAL = ".partial"
CODE = "code"


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
            write_weights(dict(tensors), folder / artifacts.WEIGHTS)
            write_manifest(folder, {"numbers": numbers})
        for path in self._checkpoints():
            if path != target:
                shutil.rmtree(path, ignore_errors=True)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or None; damaged ones are deleted."""
        for path in sorted(self._checkpoints(), key=lambda path: -int(path.name)):
            if (manifest := read_manifest(path)) is not None:
                return read_state_dict(path / artifacts.WEIGHTS), manifest["numbers"]
            log.warning("an unfinished checkpoint in %s is damaged and will be ignored", path)
            shutil.rmtree(path, ignore_errors=True)
        return None

    def clear(self) -> None:
        """Forgets the checkpoint, once the stage is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if path.name.isdigit()] if self.folder.is_dir() else []


def write_manifest(folder: Path, extra: Mapping[str, Any]) -> None:
    """Adds manifest.json with the checksum of every file of a folder."""
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    artifacts.write_json(folder / artifacts.MANIFEST, {"format": FORMAT, "files": files, **extra})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder whose files are all there and unaltered, else None."""
    try:
        manifest = json.loads((folder / artifacts.MANIFEST).read_text())
        whole = manifest["format"] == FORMAT and all(
            file_sha256(folder / name) == checksum for name, checksum in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


@dataclass(frozen=True)
class Store:
    """The folder of all stage results."""

    root: Path

    def find(self, key: str) -> Path | None:
        """The folder of a finished, undamaged result, or None; a damaged one is deleted."""
        folder = self.root / key
        if not folder.is_dir():
            return None
        if read_manifest(folder) is not None:
            return folder
        log.warning("the stored stage %s is damaged (a checksum differs); it will be computed again", key)
        shutil.rmtree(folder, ignore_errors=True)
        return None

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
            yield
        finally:
            lock.release()

    def put(self, key: str, write: Callable[[Path], None]) -> Path:
        """Adds a finished result: `write` fills a folder that then appears under the key in one rename."""
        with artifacts.new_folder(self.root / key) as folder:
            write(folder)
            write_manifest(folder, {"key": key, "versions": versions()})
        self.slot(key).clear()
        return self.root / key

    def note_code(self, meaning: str, key: str, code: Mapping[str, str]) -> None:
        """Remembers with which of our modules a result was computed, under the part of its key without them."""
        with artifacts.writing(self.root):
            (self.root / CODE).mkdir(exist_ok=True)
        artifacts.write_json(self._code(meaning), {"key": key, "code": dict(code)})

    def code_of(self, meaning: str) -> dict[str, str] | None:
        """The modules of the newest result that differs from this one in our code at most; None where there is none."""
        try:
            code = json.loads(self._code(meaning).read_text(encoding="utf-8"))["code"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return {str(name): str(value) for name, value in code.items()} if isinstance(code, dict) else None

    def _code(self, meaning: str) -> Path:
        return self.root / CODE / f"{meaning}.json"

    def entries(self) -> list[Path]:
        """All finished results."""
        if not self.root.is_dir():
            return []
        return sorted(path for path in self.root.iterdir() if (path / artifacts.MANIFEST).is_file())

    def sweep(self, used: Iterable[str]) -> tuple[int, int]:
        """Deletes results that are not in `used`, and leftovers that no process holds.

        Returns:
            how many folders went, and their bytes.
        """
        wanted, count, freed = set(used), 0, 0
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            key = path.name.lstrip(".").split(".")[0]
            if path.suffix == ".lock" or path.name == CODE or not path.is_dir():
                continue
            if path.name == key and key in wanted and read_manifest(path) is not None:
                continue
            lock = FileLock(self.root / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue  # somebody is computing this stage
            freed += size(path)
            shutil.rmtree(path, ignore_errors=True)
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
            count += 1
        for note in (self.root / CODE).glob("*.json"):
            if not (self.root / (_key_in(note) or "gone")).is_dir():
                note.unlink()
        return count, freed


def _key_in(note: Path) -> str | None:
    """The key of the result that a note is about; None where it is damaged."""
    try:
        key = json.loads(note.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return key if isinstance(key, str) and key.isalnum() else None


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint.json of a stage folder, after checking every checksum of the folder's manifest.

    Raises:
        CheckpointError: not a stage folder, or altered since it was written.
    """
    if not (folder / artifacts.CHECKPOINT).is_file():
        raise CheckpointError(f"{folder} is not a checkpoint folder: it has no {artifacts.CHECKPOINT}")
    if read_manifest(folder) is None:
        raise CheckpointError(f"{folder}: a file differs from its checksum in {artifacts.MANIFEST}; it is damaged")
    return json.loads((folder / artifacts.CHECKPOINT).read_text())
