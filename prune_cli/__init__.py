"""prune: compress neural networks from the command line. The map of the code is README.md in this folder."""

from __future__ import annotations

from typing import Any

__version__ = "0.2.0"
__all__ = ["load_pruned", "report", "save_pruned", "shrink"]


def __getattr__(name: str) -> Any:
    """Finds the Python API when it is first used: importing `prune_cli` alone stays light."""
    if name in __all__:
        from prune_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
