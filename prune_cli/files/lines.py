"""Files that grow by a line at a time and survive a crash at any moment: what a stage found out so far.

    SHA256[:16] JSON

A line that is torn, damaged, or not where it was written ends the file: it and what comes behind it is forgotten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_cli.errors import PruneError
from prune_cli.files import artifacts
from prune_cli.reading import opened, parse_json

log = logging.getLogger(__name__)

DIGITS = 16


@dataclass(frozen=True)
class Lines:
    """The lines of one file, which need not be there yet."""

    path: Path

    def append(self, value: Any) -> None:
        """Adds a JSON-serialisable value; it is on the disk when this returns.

        Raises:
            StorageError: it cannot be written.
        """
        text = json.dumps(value)
        with artifacts.writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(f"{_checksum(text, file.tell())} {text}\n".encode())
                file.flush()
                os.fsync(file.fileno())

    def read(self) -> list[Any]:
        """The values up to the first line that is not whole; the file is cut there, so that new ones follow them.

        Raises:
            StorageError: a damaged end cannot be cut off.
        """
        if not self.path.is_file():
            return []
        found, end = [], 0
        with opened(self.path) as file:
            for raw in file:
                text = raw[DIGITS + 1 :].decode(errors="replace").removesuffix("\n")
                if not raw.endswith(b"\n") or raw[: DIGITS + 1] != f"{_checksum(text, end)} ".encode():
                    break
                try:
                    found.append(parse_json(text, str(self.path)))
                except PruneError:  # nothing that `append` wrote
                    break
                end += len(raw)
        if end < self.path.stat().st_size:
            log.warning(
                "%s is damaged from line %d on; what it held from there is computed again", self.path, len(found) + 1
            )
            with artifacts.writing(self.path):
                os.truncate(self.path, end)
        return found


def _checksum(text: str, place: int) -> str:
    """Of a line and the byte at which it begins, so that none can be taken out, moved or repeated."""
    return hashlib.sha256(f"{place} {text}".encode()).hexdigest()[:DIGITS]
