"""Networks of many packages to try the structural engine on; see `scripts/coverage.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int, torch.Generator], Any]
"""(images or sequences in the batch, source of randomness) -> what the network is called with."""


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        source: the package it comes from.
        name: inside that package.
        build: makes it, with a way to make inputs.
        plain: whether weights stay as the package initialises them, because others would make no sense.
    """

    source: str
    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    plain: bool = False


def images(*shape: int) -> Inputs:
    """One tensor of normal numbers, without the batch axis in `shape`."""
    return lambda batch, generator: torch.randn(batch, *shape, generator=generator)


def tokens(length: int, vocabulary: int) -> Callable[[int, torch.Generator], Tensor]:
    """Integers from 4 on, which are no special tokens."""
    return lambda batch, generator: torch.randint(4, vocabulary, (batch, length), generator=generator)
