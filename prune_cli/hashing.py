"""Content hashes of files."""

from __future__ import annotations

import hashlib
import os

from prune_cli.errors import CheckpointError


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Returns the sha256 of the bytes of a file, in hexadecimal.

    Raises:
        CheckpointError: if the file can't be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
