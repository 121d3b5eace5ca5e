"""What a config node means, as a hash: its data, the files it names, the user code in it."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_cli.config.locations import find_file
from prune_cli.config.nodes import TRUSTED, locate
from prune_cli.hashing import file_sha256


def content_key(node: Any) -> str:
    """Hex sha256 of what a node means: its data, the bytes of the files it names, the source of user code in it.

    A string that is the path of an existing file is replaced by the file's hash, so a stage is computed again
    when its ratio file or teacher changes, and reused when the file only moved.
    """
    return hashlib.sha256(json.dumps(_canonical(node), sort_keys=True).encode()).hexdigest()


def _canonical(node: Any) -> Any:
    if isinstance(node, Mapping):
        canonical = {str(key): _canonical(value) for key, value in node.items()}
        target = node.get("_target_")
        if isinstance(target, str) and not target.startswith(TRUSTED):
            source = inspect.getsourcefile(locate(target, "node"))
            canonical["_source_"] = file_sha256(Path(source)) if source else target
        return canonical
    if isinstance(node, list | tuple):
        return [_canonical(value) for value in node]
    if isinstance(node, str) and ("/" in node or "." in node):
        scheme, path = re.fullmatch(r"(?s)([a-z]+:)?(.*)", node).groups()  # type: ignore[union-attr]  # cfg:PATH
        if (found := find_file(Path(path))).is_file():
            return {"sha256": file_sha256(found)} | ({"scheme": scheme} if scheme else {})
    return node
