"""What a user can get wrong or a run can meet, each with the exit code of `prune` (table in the README).

The message is one line: what was wrong and what would be right. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class PruneError(Exception):
    """Base of the errors that are shown as one line, without a traceback."""

    exit_code = 1


class ConfigError(PruneError):
    """An unknown recipe, option, key or value, or a combination that makes no sense; found before training."""

    exit_code = 2


class DataError(PruneError):
    """A dataset that is missing, empty or damaged."""

    exit_code = 3


class CheckpointError(PruneError):
    """A file of weights, masks or a pruned network that is damaged, unsafe or does not fit."""

    exit_code = 4


class TrainingError(PruneError):
    """Training that cannot go on, such as a loss that is not finite."""

    exit_code = 5


class StorageError(PruneError):
    """An output folder that cannot be written."""

    exit_code = 6


class SurgeryError(PruneError):
    """A network that cannot be analysed or shrunk as asked."""

    exit_code = 7


class ScheduleError(PruneError):
    """A schedule that asks for something that cannot be done, or finds no way to its target."""

    exit_code = 8


class Interrupted(PruneError):
    """SIGINT or SIGTERM arrived and a resumable checkpoint was written; the same command goes on from there."""

    exit_code = 75


LONGEST = 200  # characters of what a user typed that a message repeats


def shortened(text: str) -> str:
    """What a user typed, for a message: cut where it is very long."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns `"; did you mean 'a' or 'b'?"` for close names, else a list of what there is."""
    names = sorted(names)
    close = get_close_matches(name[:LONGEST], names, n=3, cutoff=0.55)
    if close:
        return "; did you mean " + " or ".join(repr(match) for match in close) + "?"
    return "; there is " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


SHORTAGE = re.compile(
    r"can't allocate memory|not enough memory|out of memory|unable to allocate|cannot allocate memory|bad_alloc"
    r"|storage size calculation overflowed|numel: integer multiplication overflow|array is too big"
    r"|maximum allowed dimension|invalid buffer size",
    re.I,
)


def shortage(error: BaseException) -> ConfigError | None:
    """What to say where memory is too small, or a size too large for any memory; None for other errors."""
    if not isinstance(error, MemoryError) and not SHORTAGE.search(str(error)):
        return None
    return ConfigError(
        f"not enough memory ({shortened(first_line(error))}); take smaller images (dataset.image_size), smaller batches "
        "(STAGE.batch_size) or a smaller network"
    )


def one_line(error: BaseException) -> str:
    """What an error says as one line for a terminal; characters that a terminal would obey are spelt out."""
    text = " ".join(str(error).split())
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
