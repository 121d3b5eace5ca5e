"""A recipe tried out: `limit_batches=1` makes it one epoch of one small batch per stage, unless the command line says more.

What shortens an option beyond that stands in its file, in a comment line `# tiny: schedule.epochs=2 ...`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from prune_cli.config.locations import options
from prune_cli.errors import ConfigError
from prune_cli.reading import parse_yaml, read_text

MOST = {"epochs": 1, "batch_size": 4, "images": 16, "calibration.batch_size": 4, "calibration.images": 16}
"""Keys of a stage, and the most that they are in a trial."""

GROUPS = ("schedule", "stage")  # whose `# tiny:` lines count; other groups' lines change more than lengths


def cut(content: dict[str, Any], choices: Mapping[str, str], given: Collection[str]) -> None:
    """Shortens a plain config in place where `limit_batches` is 1.

    Args:
        choices: option per group, or `GROUP@PLACE`.
        given: dotted keys that the command line sets; they stay.
    """
    if content.get("limit_batches") != 1:
        return
    if "latency" not in given:
        content["latency"] = False
    named = content.get("stages")
    stages = [name for name in content if isinstance(content[name], dict) and isinstance(named, list) and name in named]
    for place, name in choices.items():
        group, _, node = place.partition("@")
        if group not in GROUPS or (group == "stage" and node not in stages):
            continue
        places = [node] if node else [group, *(f"{stage}.{group}" for stage in stages)]
        if any(key.startswith(f"{path}.") for key in given for path in places if group != "stage"):
            continue
        for key, value in _tiny(group, name):
            for path in places:
                _lower(content, f"{path}.{key}", value, given, least=False)
    for stage in stages:
        for key, most in MOST.items():
            _lower(content, f"{stage}.{key}", most, given, least=True)


def _tiny(group: str, name: str) -> Iterator[tuple[str, Any]]:
    """Keys of an option, without what they stand under, and the values that make it short."""
    path = options(group).get(name)
    for line in re.findall(r"^# tiny: (.+)$", read_text(path, ConfigError), re.M) if path else ():
        for key, value in re.findall(r"[\w@]+\.([\w.]+)=(\S+)", line):
            yield key, parse_yaml(value, str(path), ConfigError)


def _lower(content: dict[str, Any], path: str, value: Any, given: Collection[str], *, least: bool) -> None:
    """Sets a key that is there and was not given; with `least` to no more than it is."""
    *parents, last = path.split(".")
    node: Any = content
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node or path in given:
        return
    if not least:
        node[last] = value
    elif isinstance(node[last], int) and not isinstance(node[last], bool):
        node[last] = min(node[last], value)
