"""Content hashes of files."""

from __future__ import annotations

import hashlib
import os

from prune_cli.reading import opened


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the sha256 of the bytes of a file, in hexadecimal.

    Raises:
        CheckpointError: if the file can't be read.
    """
    with opened(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
