"""Where a stage stands: how far its trainings are, and what it has removed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from prune_cli.structure import rebuild, surgery
from prune_cli.structure.lineage import Lineage
from prune_cli.training.fit import Progress


@dataclass(frozen=True)
class Removed:
    """What a selection removes, of the units and channels that there are; what a resumed stage reports too."""

    units: int = 0
    removed: int = 0
    channels: int = 0
    channels_removed: int = 0
    requested: float | None = None


@dataclass
class Clock:
    """Where the stage's trainings stand.

    Attributes:
        progress: of the present training; None before the first.
        total: epochs of it.
        until: epoch, and batches of it, that a request under way trains to; None between requests.
        begun: trainings so far.
    """

    progress: Progress | None = None
    total: int | None = None
    until: tuple[int, int] | None = None
    begun: int = 0


def shrink_progress(progress: Progress, before: nn.Module, after: nn.Module, lineage: Lineage) -> None:
    """Everything with state in a training, for a network that became smaller, in place."""
    if progress.optimizer is not None:
        surgery.repoint(progress.optimizer, before, after, lineage.kept)
    if progress.average is not None:
        progress.average = rebuild.carried(progress.average, lineage)
    # What hooks sum up per weight has its name behind their own prefix.
    sliced = rebuild.carried(
        {key.partition("/")[2]: value for key, value in progress.memory.items()}, Lineage(lineage.kept)
    )
    progress.memory = {key: sliced[key.partition("/")[2]] for key in progress.memory}
