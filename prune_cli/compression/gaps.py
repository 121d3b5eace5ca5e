"""Sparse positions as gaps of a fixed number of bits, with fillers where a gap is larger."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prune_cli.compression.kmeans import Array
from prune_cli.errors import CheckpointError

# ---------------------------------------------------------------------------------------------- gaps


def to_gaps(places: Array, length: int, bits: int) -> tuple[Array, Array]:
    """Relative positions in codes of `bits` bits (section 2).

    A code counts the zeros before an entry. A longer run of zeros is cut by fillers: entries of value zero with the
    largest code, each covering 2 ** bits zeros, behind the last entry too, so codes determine the length.

    Args:
        places: increasing positions of the entries.
        length: of the whole vector.

    Returns:
        Codes, and a bool array that is True at fillers.
    """
    runs = np.diff(np.concatenate([[-1], places, [length]])) - 1
    fillers = runs >> bits
    ends = np.cumsum(fillers + 1) - 1  # the last one is no entry
    codes = np.full(int(ends[-1]), (1 << bits) - 1, dtype=np.int64)
    filler = np.ones(len(codes), dtype=bool)
    codes[ends[:-1]] = runs[:-1] & ((1 << bits) - 1)
    filler[ends[:-1]] = False
    return codes, filler


def from_gaps(codes: Array, length: int, bits: int) -> Array:
    """Positions of the entries and fillers.

    Raises:
        CheckpointError: the codes do not cover a vector of this length.
    """
    places = np.cumsum(codes + 1) - 1
    last = int(places[-1]) if len(places) else -1
    if last >= length or length - 1 - last >= 1 << bits:
        raise CheckpointError(f"gap codes reach position {last} of {length}; the file is damaged")
    return places


def fillers(mask: Tensor, gap_bits: int) -> int:
    """Zeros that gap coding must store because a run of zeros is too long for one code of `gap_bits` bits.

    A code counts the zeros before an entry, 0 to 2 ** gap_bits - 1; a filler covers 2 ** gap_bits zeros. Zeros after
    the last entry are covered too, so that the codes determine the length.
    """
    places = torch.nonzero(mask.flatten()).flatten()
    ends = torch.cat(
        [torch.tensor([-1], device=places.device), places, torch.tensor([mask.numel()], device=places.device)]
    )
    return int(((ends[1:] - ends[:-1] - 1) >> gap_bits).sum())
