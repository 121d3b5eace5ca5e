"""Every file that is read or written: names, columns, formats, and how a write is made safe.

Nothing here can run code when it is opened: tensors are safetensors, the rest is JSON, YAML and CSV.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prune_cli.errors import StorageError

WEIGHTS = "weights.safetensors"
MASKS = "masks.safetensors"
CHECKPOINT = "checkpoint.json"
PRUNED = "pruned.yaml"
MANIFEST = "manifest.json"
RESULTS = "results.csv"
LAYERS = "layers.csv"
HISTORY = "history.csv"
CONFIG = "config.yaml"
CHOICES = "choices.json"
COMPRESSED = "weights.compressed"
NUMBERS = "numbers.json"
LOG = "run.log"
SEARCH = "search.csv"
FRONT = "front.csv"
SEARCH_PLOT = "search.svg"
POLICY = "policy.safetensors"
KEPT = "kept:"
"""In front of a group's name: the column of search.csv that says how many of its units stay."""


def remembered(tag: str) -> str:
    """The file of a snapshot that a train stage keeps; `*` for all of them."""
    return f"remembered_{tag}.safetensors"


def is_ours(name: str) -> bool:
    """Whether a file of this name in a stage folder is one that is read, and that a manifest has to cover."""
    return name in (WEIGHTS, MASKS, CHECKPOINT, PRUNED, MANIFEST, COMPRESSED, NUMBERS) or fnmatch(name, remembered("*"))


@dataclass(frozen=True)
class Row:
    """A line of results.csv: one finished stage. None where a quantity does not apply or was not measured.

    Ratios are fractions removed; macs count one multiply-add as 1; accuracies are percent of the test split.
    """

    recipe: str
    stage: str
    seed: int
    model: str
    dataset: str
    criterion: str | None
    granularity: str | None
    schedule: str | None
    distillation: str | None
    ratio_requested: float | None
    ratio_prunable: float | None
    ratio_channels: float | None
    ratio_total: float
    ratio_conv: float | None
    sparsity: float
    params: int
    params_nonzero: int
    macs: int
    macs_nonzero: int
    flops: int
    bytes: int
    bytes_stored: int | None
    bytes_pruned: int | None
    bytes_shared: int | None
    bytes_huffman: int | None
    bytes_entropy: int | None
    acc1: float
    acc5: float | None
    loss: float
    acc1_val: float | None
    select_on: str | None
    acc1_dense: float | None
    acc1_delta: float | None
    compression: float
    compression_bytes: float | None
    speedup_macs: float
    latency_ms_b1: float | None
    latency_p95_ms_b1: float | None
    latency_ms_b64: float | None
    latency_p95_ms_b64: float | None
    throughput_b64: float | None
    slower_than_dense: bool | None
    epochs: int
    seconds: float
    device: str
    dense_sha256: str | None
    key: str


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write into one line.

    Raises:
        StorageError: no space, no permission, or a file where a folder should be.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "free the place or give another one (hydra.run.dir=..., PRUNE_STORE=...)"
        if error.errno in (errno.ENOENT, errno.ESTALE):
            hint = "something else deleted it meanwhile; the same command goes on from what is left"
        raise StorageError(f"cannot write {path}: {reason}; {hint}") from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success its content is synced and renamed to `path`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            sync(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
            sync(path.parent)  # the new name itself has to survive a crash
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path` in one rename."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            temporary.chmod(0o755)
            remove(path)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Deletes a file, a link (not what it points to), or a folder with all that is in it; whatever there is, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes sorted, indented JSON in one rename."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one rename."""
    write_file(path, text)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file in one rename, text as UTF-8."""
    with new_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Writes a CSV in one rename; None is an empty cell and floats keep every digit."""
    with new_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([{key: "" if row.get(key) is None else row[key] for key in columns} for row in rows])


def table(kind: type, rows: Sequence[Any]) -> str:
    """CSV of instances of a dataclass; None is an empty cell and floats keep every digit."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """Writes results.csv."""
    write_table(path, [asdict(row) for row in rows], [field.name for field in fields(Row)])


def link_folder(source: Path, target: Path) -> None:
    """Makes `target` hold the files of `source`, as hard links where the file system can, else as copies."""
    with new_folder(target) as temporary:
        for file in source.iterdir():
            try:
                os.link(file, temporary / file.name)
            except OSError:
                shutil.copy2(file, temporary / file.name)
