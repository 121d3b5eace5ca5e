"""Increasing indices as short text: 0, 1, 2, 5, 7, 8 is `0-2 5 7-8`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain


def ranges(indices: Sequence[int]) -> str:
    """The text of increasing indices; empty where there are none."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def indices_of(text: str, most: int) -> tuple[int, ...]:
    """The inverse of `ranges`.

    Args:
        most: indices that the text may stand for; more are refused before they are made.

    Raises:
        ValueError: not increasing numbers and ranges, or too many.
    """
    found: list[range] = []
    for part in str(text).split():
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        if not match:
            raise ValueError(f"{part[:40]!r} is not an index or a range such as 3-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or (found and first < found[-1].stop):
            raise ValueError(f"{part!r} does not go on upwards")
        most -= last + 1 - first
        if most < 0:
            raise ValueError(f"{str(text)[:40]!r} stands for more indices than there can be")
        found.append(range(first, last + 1))
    return tuple(chain.from_iterable(found))
