"""What every distillation loss is given, and the options beside the loss. The losses are in the files beside this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What a network said of a batch. logits: (batch, classes)."""

    logits: Tensor


DistillationLoss = Callable[[Outputs, Outputs | None, Tensor, float], Tensor]
"""(student, teacher, labels, label_smoothing) -> scalar."""


@dataclass(frozen=True)
class Distillation:
    """A distillation option.

    Attributes:
        loss: see `DistillationLoss`.
        teacher: `dense`, the network that entered the first pruning stage; a path of weights or of a stage folder;
            or None for losses that have no teacher.
    """

    loss: DistillationLoss
    teacher: Literal["dense"] | Path | None = None
