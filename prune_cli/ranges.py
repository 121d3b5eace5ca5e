"""Increasing indices as short text: 0, 1, 2, 5, 7, 8 is `0-2 5 7-8`."""

from __future__ import annotations

import re
from collections.abc import Sequence


def ranges(indices: Sequence[int]) -> str:
    """The text of increasing indices; empty where there are none."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def indices_of(text: str) -> tuple[int, ...]:
    """The inverse of `ranges`.

    Raises:
        ValueError: not increasing numbers and ranges.
    """
    found: list[int] = []
    for part in str(text).split():
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        if not match:
            raise ValueError(f"{part!r} is not an index or a range such as 3-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first > 10_000_000 or last < first or (found and first <= found[-1]):
            raise ValueError(f"{part!r} does not go on upwards")
        found.extend(range(first, last + 1))
    return tuple(found)
