"""Learning-rate schedules: pure functions of training time, one per option of the group `lr_schedule`.

Each takes `time`, the epochs done so far as a real number in [0, epochs], and `epochs`, the length of the whole
training, and returns the factor on the optimizer's own learning rate.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

Factor = Annotated[float, Field(ge=0, le=1)]
"""Of the optimizer's own learning rate."""

Warmup = Annotated[float, Field(ge=0)]
"""Epochs of a linear rise from almost nothing."""


def constant(time: float, epochs: int, *, warmup: Warmup = 0.0) -> float:
    """1 throughout, after a linear warm-up of `warmup` epochs."""
    return _warm(time, warmup)


def multi_step(
    time: float,
    epochs: int,
    *,
    milestones: list[Annotated[float, Field(ge=0)]],
    gamma: Annotated[float, Field(gt=0)] = 0.1,
    warmup: Warmup = 0.0,
) -> float:
    """gamma ** (number of milestones passed).

    Args:
        milestones: epochs; values below 1 are fractions of the whole training.
        gamma: factor at each milestone.
        warmup: epochs of linear warm-up.
    """
    passed = sum(time >= (mark * epochs if mark < 1 else mark) for mark in milestones)
    return gamma**passed * _warm(time, warmup)


def cosine(time: float, epochs: int, *, floor: Factor = 0.0, warmup: Warmup = 0.0) -> float:
    """Half a cosine from 1 down to `floor` after the warm-up (SGDR without restarts, arXiv:1608.03983)."""
    if time < warmup:
        return _warm(time, warmup)
    fraction = min((time - warmup) / max(epochs - warmup, 1e-9), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * fraction))


def one_cycle(
    time: float,
    epochs: int,
    *,
    peak: Annotated[float, Field(gt=0, lt=1)] = 0.3,
    start: Factor = 0.04,
    floor: Factor = 1e-4,
) -> float:
    """Linear from `start` to 1 at `peak` (a fraction of the training), then linear to `floor` (arXiv:1708.07120)."""
    fraction = min(time / max(epochs, 1e-9), 1.0)
    if fraction < peak:
        return start + (1 - start) * fraction / peak
    return 1 + (floor - 1) * (fraction - peak) / (1 - peak)


def _warm(time: float, warmup: float) -> float:
    return min(1.0, (time + 1e-3) / warmup) if time < warmup else 1.0
