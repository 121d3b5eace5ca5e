"""Which of many changes break something, by trying out parts of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class TooManyTries(Exception):
    """The culprits were not found in so many tries."""


def culprits(items: Sequence[Item], holds: Callable[[Sequence[Item]], bool], tries: int) -> list[Item]:
    """The items of which each alone breaks what holds without them, found by halving.

    Args:
        items: in any order.
        holds: whether all is well with these items; asked at most `tries` times, for k culprits of n about
            2 k log2(n) times.
        tries: how often may be asked.

    Raises:
        TooManyTries: the culprits were not found by then.
    """
    left = tries

    def among(part: Sequence[Item], *, broken: bool) -> list[Item]:
        nonlocal left
        if not part:
            return []
        if not broken:
            if not left:
                raise TooManyTries
            left -= 1
            if holds(part):
                return []
        if len(part) == 1:
            return [part[0]]
        middle = len(part) // 2
        first = among(part[:middle], broken=False)
        return first + among(part[middle:], broken=not first)

    return among(items, broken=False)
