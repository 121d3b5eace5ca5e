"""What flows through a pipeline: a frozen `State`, and what each stage says of itself in an `Outcome`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prune_cli.compression.codec import Sizes
from prune_cli.console import Console
from prune_cli.data.dataset import Dataset
from prune_cli.measure.storage import MaskFormat
from prune_cli.pipeline.store import Slot
from prune_cli.structure.lineage import Lineage
from prune_cli.training.distributed import ALONE, World

Found = TypeVar("Found")


@dataclass(frozen=True)
class Architecture:
    """How to build the dense network again.

    Attributes:
        build: makes the network with fresh weights, drawn from a generator of its own, which the run's seed and the
            purpose that may be given decide.
        node: builder and arguments as JSON data; what `checkpoint.json` records.
        name: the option's name, for tables.
    """

    build: Callable[..., nn.Module]
    node: Mapping[str, Any]
    name: str


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network to learn from, in evaluation.

    Attributes:
        model: on the run's device.
        node: builder and arguments of its dense architecture.
        lineage: what surgery did to that; None where nothing.
    """

    model: nn.Module
    node: Mapping[str, Any]
    lineage: Lineage | None = None


@dataclass(frozen=True)
class Outcome:
    """What a stage reports besides the new state. None where it does not apply.

    Attributes:
        sparse_norms: `all` or `inner`: norms that a sparsify stage made sparse, where the network has both kinds.
        files: name -> content of the files that the stage leaves beside its checkpoint: tables, plots, compressed
            weights.
        coded: parameter name -> bytes of a shared weight after each stage of Deep Compression.
    """

    epochs: int = 0
    select_on: str | None = None
    ratio_requested: float | None = None
    ratio_prunable: float | None = None
    ratio_channels: float | None = None
    history: tuple[Mapping[str, float], ...] = ()
    sparse_norms: str | None = None
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    coded: Mapping[str, Sizes] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """Everything a stage may use. A stage may train the module it owns in place and returns `state.evolve(...)`.

    Attributes:
        model: the current network, on `device`.
        data: the dataset, on `device`.
        architecture: how to build the dense network.
        seed: the run's seed; stages draw from `stage_seed`.
        stage: unique name of the running stage.
        masks: parameter name -> bool tensor, True = keep.
        forms: parameter name -> how its mask is stored; single weights where absent.
        lineage: what surgery did to the dense network since it was built; None before any.
        dense: stage folder of the network that entered the first pruning stage; the default teacher.
        parent: how to build that one.
        remembered: tag -> file of a snapshot that a train stage kept.
        slot: where the running stage keeps its resumable checkpoint.
        interrupted: becomes True when the user asks to stop.
        teachers: those that this process has read, by their files and times of change, so that each is read once; nothing
            else changes by it.
        world: this process among those that run the pipeline together.
        sparse_norms: while a pipeline is checked, the `Outcome.sparse_norms` that the stages so far will have.
        shrunk_by: while a pipeline is checked, the stage that will have made the network smaller than the dense one.
        trained_by: while a pipeline is checked, the last stage that will have trained the network.
        checked: what `once` found.
    """

    model: nn.Module
    data: Dataset
    architecture: Architecture
    device: torch.device
    seed: int
    console: Console
    slot: Slot
    stage: str = "initial"
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    forms: Mapping[str, MaskFormat] = field(default_factory=dict)
    lineage: Lineage | None = None
    dense: Path | None = None
    parent: Architecture | None = None
    remembered: Mapping[str, Path] = field(default_factory=dict)
    interrupted: Callable[[], bool] = lambda: False
    teachers: dict[str, Teacher] = field(default_factory=dict)
    world: World = ALONE
    outcome: Outcome = Outcome()
    sparse_norms: str | None = None
    shrunk_by: str | None = None
    trained_by: str | None = None
    checked: dict[tuple[int, Hashable], tuple[nn.Module, Any]] = field(default_factory=dict, compare=False, repr=False)

    def once(self, what: Hashable, find: Callable[[], Found]) -> Found:
        """What checks find out of the network as it is before the first stage, found once for all of them."""
        key = id(self.model), what
        if key not in self.checked:
            self.checked[key] = self.model, find()  # the network is kept too, so that its id is not another one's
        found: Found = self.checked[key][1]
        return found

    def evolve(self, **changes: Any) -> State:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def stage_seed(self) -> int:
        """Seed of the running stage: a pure function of the run's seed and the stage's name and occurrence."""
        return derive_seed(self.seed, self.stage)

    def unfinished(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint inside the running stage, the same on every rank; None for a fresh start."""
        found = self.slot.load() if self.world.main else None
        if not self.world.broadcast(found is not None):
            return None
        tensors, numbers = found or (None, None)
        return self.world.broadcast_tensors(tensors), self.world.broadcast(numbers)

    def keep(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Replaces the checkpoint inside the running stage; only rank 0 writes."""
        if self.world.main:
            self.slot.save(tensors, numbers)

    def example_inputs(self) -> Tensor:
        """One all-zero image, for analysing shapes."""
        return torch.zeros(1, *self.data.shape, device=self.device)


def derive_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, independent of every other purpose's."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
