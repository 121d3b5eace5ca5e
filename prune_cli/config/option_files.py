"""What an option is made of: its file, the files that this one's defaults name, and the comments on their keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_cli.config.locations import searchpath, shipped
from prune_cli.errors import ConfigError
from prune_cli.reading import read_text, read_yaml

LINE = re.compile(
    r"(?P<indent> *)(?P<key>[\w-]+):(?P<value>(?:\s+(?:[^\s#]\S*|#(?=\S)\S*))*)(?:\s+# ?(?P<comment>.*))?"
)
WIDTH = 32  # column at which comments begin


def files(name: str) -> list[Path]:
    """The files that make up a config, in the order in which they are merged; none where there is no such config.

    Followed are defaults that a file takes into its own package (`- other`, `- /shared/other@_here_`), not options of
    other groups.

    Args:
        name: group and option, as `granularity/filter`.
    """
    places = [folder / f"{name}.yaml" for folder in (shipped(), *searchpath())]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return []
    content = read_yaml(path, ConfigError)
    defaults = content.get("defaults", []) if isinstance(content, dict) else []
    found: list[Path] = []
    for entry in defaults:
        other, _, package = str(entry).partition("@")
        if isinstance(entry, str) and other != "_self_" and package in ("", "_here_"):
            found += files(other.lstrip("/") if other.startswith("/") else f"{name.rpartition('/')[0]}/{other}")
    return [*found, path]


def keys(name: str) -> set[str]:
    """The keys that the files of a config set; see `files`."""
    return set(content(name))


def content(name: str) -> dict[str, Any]:
    """What the files of a config set, by its keys; see `files`."""
    found: dict[str, Any] = {}
    for path in files(name):
        own = read_yaml(path, ConfigError)
        found |= {str(key): value for key, value in own.items()} if isinstance(own, dict) else {}
    found.pop("defaults", None)
    return found


@dataclass
class Comments:
    """What recipe files say of keys.

    Attributes:
        texts: dotted path of a key -> its comment.
        same: dotted path of a key -> path of the node that it takes over whole (`granularity: ${granularity}`).
    """

    texts: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)

    def of(self, path: str) -> str:
        """The comment on a key, empty where there is none."""
        if path in self.texts:
            return self.texts[path]
        head, _, rest = path.rpartition(".")
        while head:
            if head in self.same:
                return self.of(f"{self.same[head]}.{rest}")
            head, _, last = head.rpartition(".")
            rest = f"{last}.{rest}"
        return ""

    def read(self, path: Path, package: str) -> None:
        """Adds those of a file whose keys are in a package."""
        last = ""
        for line, key in _keyed(read_text(path, ConfigError)):
            name = f"{package}.{key}" if package else key
            match = LINE.fullmatch(line)
            if match is None:
                if last and re.match(r"\s+#", line):  # a comment that goes on
                    self.texts[last] += " " + line.strip().lstrip("# ")
                continue
            last = ""
            if match["comment"]:
                self.texts[name], last = match["comment"].strip(), name
            if reference := re.fullmatch(r"\s+\$\{([\w.]+)\}", match["value"] or ""):
                self.same[name] = reference.group(1)


def _keyed(text: str) -> Iterator[tuple[str, str]]:
    """Lines of YAML, with the dotted path of the key that each begins, or of the last one before it."""
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            indent = len(match["indent"])
            stack = [(depth, key) for depth, key in stack if depth < indent] + [(indent, match["key"])]
        yield line, ".".join(key for _, key in stack)


def comments(choices: Mapping[str, str]) -> Comments:
    """The comments on the keys of a composed config.

    Args:
        choices: option chosen per group, as Hydra reports them: `dataset`, `stage@train`, `optimizer@train.optimizer`.
    """
    found = Comments()
    found.read(shipped() / "config.yaml", "")
    for group, option in choices.items():
        group, _, package = group.partition("@")
        for path in files(f"{group}/{option}") if group != "recipe" else ():
            found.read(path, package or group)
    return found


def commented(config: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """A composed config as YAML, with the comments of its files behind the keys."""
    import yaml

    said, lines = comments(choices), []
    for line, key in _keyed(yaml.safe_dump(dict(config), sort_keys=False, width=float("inf"))):
        comment = said.of(key) if LINE.fullmatch(line) else ""
        lines.append(f"{line:<{WIDTH}}  # {comment}" if comment else line)
    return "\n".join(lines) + "\n"
