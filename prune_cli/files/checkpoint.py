"""`checkpoint.json` of a stage folder, and `manifest.json` with the checksums of the files beside it.

Both may come from elsewhere: every value that is used later has been checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prune_cli.errors import CheckpointError, PruneError
from prune_cli.files import artifacts
from prune_cli.files.artifacts import Row
from prune_cli.hashing import file_sha256
from prune_cli.reading import mapping, read_json, shown

FORMAT = 1
SIDES, ELEMENTS = 1 << 16, 1 << 24
"""Of one axis of an input and of one input, at most."""
CLASSES = 1 << 24

# What a row of the tables is made of, beside what `Row` itself names.
_COUNTS = ("params", "params_nonzero", "macs", "macs_nonzero", "bytes", "epochs")
_NEWER = ("conv_weights", "conv_weights_nonzero")  # counts that 0.1 did not write
_FACTS = (
    "acc1", "acc5", "loss", "acc1_val", "select_on", "ratio_requested", "ratio_prunable", "seconds", "device",
    "latency_ms_b1", "latency_p95_ms_b1", "latency_ms_b64", "latency_p95_ms_b64", "throughput_b64",
)  # fmt: skip
_KINDS: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
_COLUMNS = {field.name: str(field.type).split(" | ") for field in fields(Row)}
_COUNTED = {key: ["int"] for key in (*_COUNTS, *_NEWER)}


@dataclass(frozen=True)
class Checkpoint:
    """What `checkpoint.json` says.

    Attributes:
        model: builder and arguments of the dense network, as in a recipe's `model`; not to be called unseen.
        in_shape: of one input without the batch.
        weights_sha256: of the weights, see `tensors.state_sha256`.
        forms: parameter name -> fields of the `MaskFormat` in which its mask was chosen.
        measured: what the tables are made of, see `pipeline.results.measure_stage`.
    """

    model: Mapping[str, Any]
    model_name: str
    num_classes: int
    in_shape: tuple[int, ...]
    weights_sha256: str
    measured: Mapping[str, Any]
    forms: Mapping[str, Mapping[str, Any]]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads `checkpoint.json`; the files beside it are not looked at, see `require_whole`.

    Raises:
        CheckpointError: there is none, it is damaged, or it says what no stage writes.
    """
    path = folder / artifacts.CHECKPOINT
    content = read_json(path)
    found = Checkpoint(
        model=_node(content.get("model"), path),
        model_name=_kept(content, "model_name", ["str"], path),
        num_classes=require_classes(content.get("num_classes"), str(path)),
        in_shape=require_shape(content.get("in_shape"), str(path)),
        weights_sha256=_kept(content, "weights_sha256", ["str"], path),
        measured=mapping(content.get("measured"), f"{path}: measured"),
        forms=mapping(content.get("forms", {}), f"{path}: forms"),
    )
    _check_measured(found.measured, path)
    for name, form in found.forms.items():
        _check_form(form, f"{path}: forms.{name}")
    return found


def require_shape(given: Any, source: str) -> tuple[int, ...]:
    """The shape of an input that a file names, if it is one.

    Raises:
        CheckpointError: it is none, or too large for any image.
    """
    sizes = given if isinstance(given, list | tuple) else ()
    if not 1 <= len(sizes) <= 4 or not all(type(size) is int and 1 <= size <= SIDES for size in sizes):
        raise CheckpointError(f"{source}: in_shape {shown(given)} is no shape of an input such as [3, 32, 32]")
    if math.prod(sizes) > ELEMENTS:
        raise CheckpointError(f"{source}: in_shape {shown(given)} is more than {ELEMENTS:,} numbers per input")
    return tuple(sizes)


def require_classes(given: Any, source: str) -> int:
    """The number of classes that a file names, if it is one.

    Raises:
        CheckpointError: it is none.
    """
    if type(given) is not int or not 1 <= given <= CLASSES:
        raise CheckpointError(f"{source}: num_classes {shown(given)} is no number of classes from 1 to {CLASSES:,}")
    return given


def _node(given: Any, path: Path) -> Mapping[str, Any]:
    node = mapping(given, f"{path}: model")
    if not isinstance(node.get("_target_"), str):
        raise CheckpointError(f"{path}: model names no builder (_target_)")
    return node


def _kept(content: Mapping[str, Any], key: str, kinds: list[str], where: Path | str) -> Any:
    """A value, if it is there and of one of the kinds, which are named as in annotations."""
    if key not in content:
        raise CheckpointError(f"{where}: {key} is missing")
    value = content[key]
    if any(_is(value, kind) for kind in kinds):
        return value
    raise CheckpointError(f"{where}: {key} is {shown(value)}, not {' or '.join(kinds)}")


def _is(value: Any, kind: str) -> bool:
    if value is None or isinstance(value, bool):
        return kind == ("None" if value is None else "bool")
    return kind != "None" and isinstance(value, _KINDS[kind])


def _check_measured(measured: Mapping[str, Any], path: Path) -> None:
    where = f"{path}: measured"
    for key in (*_COUNTS, *_FACTS):
        if key not in measured:
            raise CheckpointError(f"{where}: {key} is missing")
    for key in measured.keys() & {*_COUNTED, *_COLUMNS}:
        _kept(measured, key, _COUNTED.get(key) or _COLUMNS[key], where)
    for part in ("layers", "history"):
        rows = measured.get(part)
        if not isinstance(rows, list):
            raise CheckpointError(f"{where}: {part} is no list")
        for row in rows:
            for value in mapping(row, f"{where}: a row of {part}").values():
                if isinstance(value, dict | list):
                    raise CheckpointError(f"{where}: {part} holds {shown(value)} instead of a number or a name")
    for epoch in measured["history"]:
        _kept(epoch, "epoch", ["int"], f"{where}: a row of history")
        for key in epoch:
            _kept(epoch, key, ["float", "None"], f"{where}: a row of history")


def _check_form(form: Any, where: str) -> None:
    name = mapping(form, where).get("format", "element")
    if (
        not isinstance(name, str)
        or not re.fullmatch(r"[a-zA-Z]\w*(\.[a-zA-Z]\w*)*", name)
        or set(form) - {"format", "numbers"}
    ):
        raise CheckpointError(f"{where}: {shown(form)} is no format of storage")
    numbers = mapping(form.get("numbers", {}), f"{where}.numbers")
    if not all(type(number) is int and 0 <= number <= SIDES for number in numbers.values()):
        raise CheckpointError(f"{where}: {shown(form)} is no format of storage")


# ------------------------------------------------------------------------------------------------------- checksums


def write_manifest(folder: Path, extra: Mapping[str, Any]) -> None:
    """Adds manifest.json with the checksum of every file of a folder."""
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    artifacts.write_json(folder / artifacts.MANIFEST, {"format": FORMAT, "files": files, **extra})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, if it covers all files of ours in there and none of them was altered, else None.

    What others have put beside them is left alone.
    """
    try:
        manifest = read_json(folder / artifacts.MANIFEST)
        files = mapping(manifest.get("files"), "files")
        ours = {path.name for path in folder.iterdir() if artifacts.is_ours(path.name)} - {artifacts.MANIFEST}
        whole = manifest.get("format") == FORMAT and {artifacts.WEIGHTS, *ours} <= files.keys()
        whole = whole and all(Path(name).name == name for name in files)
        whole = whole and all(file_sha256(folder / name) == checksum for name, checksum in files.items())
    except (OSError, PruneError):
        return None
    return manifest if whole else None


def require_whole(folder: Path) -> Checkpoint:
    """The checkpoint of a stage folder, after checking every checksum of the folder's manifest.

    Raises:
        CheckpointError: not a stage folder, or altered since it was written.
    """
    if not (folder / artifacts.CHECKPOINT).is_file():
        raise CheckpointError(f"{folder} is not a checkpoint folder: it has no {artifacts.CHECKPOINT}")
    if read_manifest(folder) is None:
        raise CheckpointError(f"{folder}: a file differs from its checksum in {artifacts.MANIFEST}; it is damaged")
    return read_checkpoint(folder)
