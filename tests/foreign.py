"""Folders as somebody else may have written them: planted code, damage and bombs, with checksums that match."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from prune_cli.files.checkpoint import write_manifest
from prune_cli.hashing import file_sha256
from prune_cli.reading import read_yaml

OLD = Path(__file__).parent / "files" / "runs_0_1"
CODE = {"_target_": "builtins.open", "file": "PWNED", "mode": "w"}
"""What leaves a file in the working directory if anything builds it."""


def fetched(run: str, place: Path) -> Path:
    """A copy of a run folder of version 0.1: filter, stripe or element."""
    return Path(shutil.copytree(OLD / run, place / "theirs", dirs_exist_ok=True))


def sign(stage: Path) -> None:
    """Makes all checksums of a stage folder match what is in it now, as a forger would."""
    path = stage / "pruned.yaml"
    try:
        content = read_yaml(path)  # of a bomb nobody gets a checksum
        content["sha256"] = {name: file_sha256(stage / name) for name in content["sha256"]}
        content.pop("checksum", None)
        text = json.dumps(content, sort_keys=True)
        content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    except Exception:  # there is none, or no checksum would help what is in it
        pass
    manifest = stage / "manifest.json"
    rest = {key: value for key, value in json.loads(manifest.read_text()).items() if key not in ("files", "format")}
    manifest.unlink()
    write_manifest(stage, rest)


def edit_yaml(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(yaml.safe_dump(change(yaml.safe_load(path.read_text())), sort_keys=False))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def planted(content: Any, value: Any, most: int = 2, *, thorough: bool = True) -> Iterator[tuple[str, Any]]:
    """Copies of plain data with a value in one place each: for every container in it, instead of an entry, in a list or
    mapping there, and beside the entries.

    Args:
        most: how many entries of a list, and how many keys of a mapping, are taken.
        thorough: all these forms in each container, else one after the other.

    Yields:
        Where the value is, and the copy.
    """
    forms = [value, [value], {"a": [value]}]
    for number, (path, container) in enumerate(_containers(content, (), most)):
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        places = [(key, form) for key in keys[:most] for form in forms]
        places.append(("planted" if isinstance(container, dict) else None, value))
        for key, form in places if thorough else [places[number % len(places)]]:
            changed = copy.deepcopy(content)
            inner = changed
            for step in path:
                inner = inner[step]
            if key is None:
                inner.append(form)
            else:
                inner[key] = form
            yield "/".join(map(str, (*path, key))), changed


def _containers(content: Any, path: tuple[Any, ...], most: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(content, dict | list):
        yield path, content
        entries = list(content.items()) if isinstance(content, dict) else list(enumerate(content))[:most]
        for key, value in entries:
            yield from _containers(value, (*path, key), most)
