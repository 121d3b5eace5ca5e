"""The hash of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_cli.errors import CheckpointError
from prune_cli.hashing import file_sha256


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(CheckpointError, match="can't read"):
        file_sha256(tmp_path / "b")
