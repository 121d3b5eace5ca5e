"""Snapshots of a network in training, under tags: what a schedule, or a train stage (`remember`), keeps to go back to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.errors import ConfigError
from prune_cli.files import artifacts
from prune_cli.files.weights import read_state_dict
from prune_cli.structure.lineage import Lineage
from prune_cli.structure.rebuild import carried
from prune_cli.training.fit import Progress

INIT = "init"
FRESH = "fresh"
CLOCK = "clock"
PREFIX = "remembered/"


@dataclass(frozen=True)
class Snapshot:
    """A network at one moment of a training.

    Attributes:
        weights: parameters and buffers by name.
        masks: parameter name -> True = keep.
        epoch, step: whole epochs trained, and batches of the next.
        steps: batches of an epoch.
        facts: what its masks removed, for tables; plain data.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    steps: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)

    def place(self, steps: int) -> tuple[int, int]:
        """Epoch and step of the same moment in a training with other batches."""
        return self.epoch, round(self.step * steps / self.steps)

    def shrunk(self, lineage: Lineage) -> Snapshot:
        """The same moment of a network that became smaller."""
        masks = {name: masking.sliced(mask, lineage.kept.get(name, {})) for name, mask in self.masks.items()}
        return replace(self, weights=carried(self.weights, lineage), masks=masks)


def snapshot(model: nn.Module, masks: Mapping[str, Tensor], progress: Progress | None, steps: int) -> Snapshot:
    """The network as it is now."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    now = progress or Progress()
    whole, step = divmod(now.epoch * steps + now.step, steps)
    return Snapshot(weights, {name: mask.clone() for name, mask in masks.items()}, whole, step, steps)


def moment(tag: str | int, steps: int) -> int:
    """After how many optimizer steps a tag of a train stage is taken: `0`, `500st` (steps) or `3ep` (epochs).

    Args:
        steps: of an epoch.

    Raises:
        ConfigError: another form.
    """
    match = re.fullmatch(r"0|(\d+)(st|ep)", str(tag))
    if not match:
        raise ConfigError(
            f"remember: {tag!r} is not a moment; give 0 for the initial weights, steps as 500st or epochs as 3ep"
        )
    return int(match[1] or 0) * (steps if match[2] == "ep" else 1)


class Recorder:
    """Takes the snapshots of a training when their moments come.

    Args:
        tags: see `moment`.
        model: in training.
        batches: of an epoch.
        accumulate: batches per optimizer step.
    """

    def __init__(self, tags: Sequence[str], model: nn.Module, batches: int, accumulate: int) -> None:
        self._model, self._batches, self._accumulate = model, batches, accumulate
        self._steps = -(-batches // accumulate)
        self._due = {tag: moment(tag, self._steps) for tag in tags}
        self.taken: dict[str, Snapshot] = {}

    def __call__(self, progress: Progress | None) -> None:
        """Looks whether a snapshot is due; call it before the first and after every batch."""
        epoch, batch = (progress.epoch, progress.step) if progress else (0, 0)
        if batch % self._accumulate and batch != self._batches:
            return
        done = epoch * self._steps + -(-batch // self._accumulate)
        for tag, due in self._due.items():
            if due == done and tag not in self.taken:
                self.taken[tag] = snapshot(self._model, {}, progress, self._batches)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of them."""
        return {
            f"{PREFIX}{tag}/{name}": value for tag, one in self.taken.items() for name, value in _stored(one).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`; others are ignored."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(PREFIX):
                tag, _, rest = name.removeprefix(PREFIX).partition("/")
                found.setdefault(tag, {})[rest] = value
        self.taken = {tag: _snapshot(values) for tag, values in found.items()}

    def files(self) -> dict[str, bytes]:
        """Name -> content of the files that the stage leaves: one per tag."""
        return files(self.taken)


def files(snapshots: Mapping[str, Snapshot]) -> dict[str, bytes]:
    """Name -> content of the files that a stage leaves: one per tag."""
    return {artifacts.remembered(tag): _bytes(_stored(one)) for tag, one in snapshots.items()}


def read(path: Path) -> Snapshot:
    """The snapshot of a file that a stage left, on the CPU.

    Raises:
        CheckpointError: damaged.
    """
    return _snapshot(read_state_dict(path))


def _stored(one: Snapshot) -> dict[str, Tensor]:
    return {**one.weights, CLOCK: torch.tensor([one.epoch, one.step, one.steps])}


def _snapshot(tensors: Mapping[str, Tensor]) -> Snapshot:
    weights = {name: value for name, value in tensors.items() if name != CLOCK}
    epoch, step, steps = tensors[CLOCK].tolist()
    return Snapshot(weights, {}, epoch, step, steps)


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.cpu().contiguous() for name, value in tensors.items()})
