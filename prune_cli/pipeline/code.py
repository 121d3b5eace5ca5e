"""Which modules of ours a result depends on: a release that changes one of them computes the result again.

The imports are followed as text, without running anything, from the functions that a config node names by `_target_`.
What only carries results from stage to stage (`pipeline`, `files`) or says something to people does not count: results
go on from what was written, and a change of the format raises `checkpoint.FORMAT`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
CARRIES = ("prune_cli.pipeline", "prune_cli.files", "prune_cli.commands", "prune_cli.config", "prune_cli.reading")
SAYS = ("prune_cli.console", "prune_cli.progress", "prune_cli.signals", "prune_cli.errors", "prune_cli.__init__")
MEASURES = ("prune_cli.measure.accuracy", "prune_cli.measure.cost", "prune_cli.measure.storage")

_IMPORT = re.compile(r"^[ \t]*from (prune_cli[\w.]*) import (?:\(([^)]*)\)|(.*))$", re.M)
_SILENT = re.compile(r'^[ \t]*(?:#.*|[rR]?"""(?:.|\n)*?"""[ \t]*)?\n', re.M)  # comments, docstrings, empty lines


def code_behind(node: Any) -> dict[str, str]:
    """The modules of ours that a config node's result depends on, with a hash of what they do.

    Comments, docstrings and empty lines are no part of the hash.

    Args:
        node: plain data; every `_target_` in it counts, at any depth.

    Returns:
        module name -> sha256 in hexadecimal; user code is part of the node's content (`config.content`) instead.
    """
    return {module: hash_of(module) for module in sorted(_reachable([*_targets(node), *MEASURES]))}


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the modules that differ, as files of the package."""
    names = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    return [name.removeprefix("prune_cli.").replace(".", "/") + ".py" for name in sorted(names)]


@functools.cache
def hash_of(module: str) -> str:
    """Hex sha256 of a module's source without what cannot change a result."""
    return hashlib.sha256(_SILENT.sub("", _source(module)).encode()).hexdigest()


def _source(module: str) -> str:
    return _file(module).read_text(encoding="utf-8")


def _file(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


@functools.cache
def _is_module(name: str) -> bool:
    return _file(name).is_file()


def _targets(node: Any) -> Iterator[str]:
    """Modules of ours that a node names."""
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if isinstance(target, str) and target.startswith("prune_cli."):
            yield target.rpartition(".")[0]
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _targets(value)


def _reachable(modules: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or module in SAYS or module.startswith(CARRIES) or not _is_module(module):
            continue
        found.add(module)
        waiting += _imports(module)
    return found


@functools.cache
def _imports(module: str) -> frozenset[str]:
    """What a module imports of ours, anywhere in it: modules, and those that hold the names."""
    named = set()
    for source, several, one in _IMPORT.findall(_source(module)):
        named.add(source)
        named |= {f"{source}.{name.split()[0]}" for name in (several or one).split("#")[0].split(",") if name.strip()}
    return frozenset(named)
