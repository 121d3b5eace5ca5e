"""Files that grow by a line at a time and survive a crash at any moment: what a stage found out so far.

    SHA256[:16] JSON

A line that is torn or damaged ends the file: it and what comes behind it is forgotten.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_cli.files import artifacts

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
                file.write(f"{_checksum(text)} {text}\n".encode())
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
        with self.path.open("rb") as file:
            for raw in file:
                text = raw[DIGITS + 1 :].decode(errors="replace").removesuffix("\n")
                if not raw.endswith(b"\n") or raw[: DIGITS + 1] != f"{_checksum(text)} ".encode():
                    break
                found.append(json.loads(text))
                end += len(raw)
        if end < self.path.stat().st_size:
            with artifacts.writing(self.path):
                os.truncate(self.path, end)
        return found


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
