"""The one way in for text files that somebody else may have written: JSON, YAML, CSV; plain values only, in bounds.

What comes back is made of mappings, lists, strings, numbers, booleans and None, at most `DEPTH` deep and `VALUES` many,
aliases counted as what they stand for. Nothing is built, imported or called here, whatever a file says.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from prune_cli.errors import CheckpointError, PruneError

SIZE = 1 << 26
"""Bytes of a text file, at most."""

DEPTH = 64
"""Mappings and lists inside each other, at most; a pruned network with replaced modules inside each other has 30."""

VALUES = 2_000_000
"""Values in a file, at most."""

_DIGITS = 400  # of a number; more would only keep the arithmetic busy
_KEYS = 1000  # numbers as keys of a mapping
_NUMBER = re.compile(r"[-+.:_0-9a-fA-FxXoO]+")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT = "tag:yaml.org,2002:str"
_Safe: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Safe):  # type: ignore[misc]
    """PyYAML's loader of plain values, without mappings of so many numbers that their hashes could be made to collide."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if len(node.value) > _KEYS and sum(key.tag in _NUMBERS for key, _ in node.value) > _KEYS:
            raise yaml.constructor.ConstructorError(None, None, "a mapping of too many numbers", node.start_mark)
        return super().construct_mapping(node, deep)


Refusal = type[PruneError]
"""The class of the error: CheckpointError for what a program wrote, ConfigError for what a user writes."""


# --------------------------------------------------------------------------------------------------------- files


@contextmanager
def opened(path: str | os.PathLike[str], refusal: Refusal = CheckpointError) -> Iterator[io.BufferedReader]:
    """Opens a regular file for reading; a pipe would be waited for, a device would never end.

    Raises:
        PruneError: of the class `refusal`: there is no such file, or it is of another kind.
    """
    try:
        if "\0" in str(path) or not stat.S_ISREG(os.stat(path).st_mode):
            raise refusal(f"can't read {str(path)!r}: it is no file")
        with open(path, "rb", opener=_without_waiting) as stream:
            yield stream
    except OSError as error:
        raise refusal(f"can't read {path}: {error.strerror or error}") from error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: Path, refusal: Refusal = CheckpointError) -> str:
    """The text of a file in UTF-8.

    Raises:
        PruneError: of the class `refusal`: it cannot be read, is larger than `SIZE`, or is no UTF-8.
    """
    with opened(path, refusal) as stream:
        content = stream.read(SIZE + 1)
    if len(content) > SIZE:
        raise refusal(f"{path} is larger than {SIZE >> 20} MiB; no file of its kind is")
    return _decoded(content, str(path), refusal)


def read_json(path: Path, refusal: Refusal = CheckpointError) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        PruneError: of the class `refusal`, in one line.
    """
    return mapping(parse_json(read_text(path, refusal), str(path), refusal), str(path), refusal)


def read_yaml(path: Path, refusal: Refusal = CheckpointError) -> Any:
    """What a YAML file holds, None where it is empty.

    Raises:
        PruneError: of the class `refusal`, in one line.
    """
    return parse_yaml(read_text(path, refusal), str(path), refusal)


def read_table(path: Path, refusal: Refusal = CheckpointError) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its first line; missing cells are empty.

    Raises:
        PruneError: of the class `refusal`, in one line.
    """
    try:
        rows = csv.DictReader(io.StringIO(read_text(path, refusal), newline=""), restval="")
        return [{str(key): str(value) for key, value in row.items() if key is not None} for row in rows]
    except csv.Error as error:
        raise refusal(f"{path} is no CSV: {error}") from error


# ---------------------------------------------------------------------------------------------------------- texts


def parse_json(text: str | bytes, source: str, refusal: Refusal = CheckpointError) -> Any:
    """What a JSON text holds.

    Args:
        source: where the text is from, for messages.

    Raises:
        PruneError: of the class `refusal`, in one line: damaged, or out of bounds.
    """
    text = _decoded(text, source, refusal) if isinstance(text, bytes) else text
    if text.count(",") > VALUES:
        raise refusal(f"{source} holds more than {VALUES:,} values")
    try:
        return _plain(json.loads(text), source, refusal)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{source} is no JSON: {_reason(error)}") from error


def parse_yaml(text: str, source: str, refusal: Refusal = CheckpointError) -> Any:
    """What a YAML text of one document holds, without tags.

    Raises:
        PruneError: of the class `refusal`, in one line: damaged, out of bounds, or values that are not plain, such as
            dates (which are written in quotes) and Python objects.
    """
    try:
        _check_size(text, source, refusal)
        return _plain(yaml.load(text, Loader=_Loader), source, refusal)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise refusal(f"{source} is no YAML of plain values: {_reason(error)}") from error


def _check_size(text: str, source: str, refusal: Refusal) -> None:
    """Counts depth and values from the parser's events, before anything is built of them."""
    whole: dict[str, int] = {}  # anchor -> values that it stands for
    around: list[tuple[str | None, int]] = []  # anchors of what is open, and the count before each
    count = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in around):
                raise refusal(f"{source}: *{event.anchor} stands inside itself")
            count += whole.get(str(event.anchor), 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                whole[event.anchor] = 1
            if len(event.value) > _DIGITS and _is_number(event):
                raise refusal(f"{source}: a number of {len(event.value)} characters")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = around.pop()
            if anchor:
                whole[anchor] = count - before
        if len(around) > DEPTH or count > VALUES:
            raise refusal(f"{source}: {_BOUNDS}")


def _is_number(event: Any) -> bool:
    if event.tag is not None:
        return event.tag != _TEXT
    return not event.style and _NUMBER.fullmatch(event.value) is not None


_BOUNDS = f"more than {DEPTH} levels or {VALUES:,} values, aliases counted as what they stand for"


def _plain(content: Any, source: str, refusal: Refusal) -> Any:
    """The content, if it is plain data in bounds and all its text can be written again."""
    waiting = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            value.isascii() or value.encode()  # ValueError: half a character, as in "\ud800"
        elif not (value is None or isinstance(value, (bool, int, float))):
            raise refusal(f"{source}: {shown(value)} is a {type(value).__name__}; write it in quotes")
        if depth > DEPTH:
            raise refusal(f"{source}: {_BOUNDS}")
    return content


def mapping(value: Any, source: str, refusal: Refusal = CheckpointError) -> dict[str, Any]:
    """The value, if it is a mapping with names as keys.

    Raises:
        PruneError: of the class `refusal`: it is something else.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise refusal(f"{source} should be a mapping of names, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = _short.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 100, 100, 50


def _decoded(content: bytes, source: str, refusal: Refusal) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise refusal(f"{source} is no text in UTF-8: byte {content[error.start]:#04x} in line {line}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"{problem} in line {mark.line + 1}"
    return " ".join(str(error).split())[:200]
