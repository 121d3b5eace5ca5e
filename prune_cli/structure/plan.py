"""What an analysis finds: families of units, and the arithmetic that counts a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from prune_cli.errors import SurgeryError
from prune_cli.structure.interpreter import Example
from prune_cli.structure.labels import Constraints
from prune_cli.structure.trace import Fallbacks, Trace

AxisOf = tuple[str, int]


@dataclass(frozen=True, slots=True)
class PlanCost:
    """Parameters, and multiply-adds (one multiply-add = 1) of one forward pass on the example inputs."""

    params: int
    macs: int


@dataclass(frozen=True, slots=True)
class Family:
    """Units that live on the same producing axes: what a ratio applies to.

    Attributes:
        name: dotted name of the first layer that produces these channels.
        units: unit ids, in the order of their first position.
        producers: (parameter, axis) whose slices make the channels.
        consumers: (parameter, axis) that read them.
        others: (parameter or buffer, axis) that go along: biases, norms, depthwise kernels, running statistics.
    """

    name: str
    units: np.ndarray
    producers: tuple[AxisOf, ...]
    consumers: tuple[AxisOf, ...]
    others: tuple[AxisOf, ...]


@dataclass(frozen=True, slots=True)
class Tally:
    """The arithmetic of `count`: products of numbers of kept positions."""

    ids: np.ndarray  # unit ids of all distinct axes, end to end
    starts: np.ndarray  # where each axis begins in `ids`
    params: tuple[np.ndarray, np.ndarray]  # static factor and indices of axes, one row per parameter
    macs: tuple[np.ndarray, np.ndarray]  # the same, one row per operator
    param_layers: tuple[str, ...]
    mac_layers: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What can be removed from a network.

    Attributes:
        axes: parameter or buffer name -> axis -> unit id per position, 0 = fixed. Tied names share arrays.
        families: the units that a ratio applies to.
        size: number of unit ids, including 0; `keep` arrays have this length and `keep[0]` is ignored.
        warnings: one line per operator that froze channels.
        norms: units that a norm over channels sees: there the masked network differs from the shrunk one.
        example: the example inputs.
        evidence: what the analysis said about the variables, and (name, axis, first variable, size) of every axis, for
            `whole.whole`.
    """

    axes: Mapping[str, Mapping[int, np.ndarray]]
    families: tuple[Family, ...]
    size: int
    warnings: tuple[str, ...]
    norms: frozenset[int]
    tally: Tally
    example: Example = field(repr=False)
    traces: tuple[Trace, ...] = field(repr=False)
    variables: np.ndarray = field(repr=False)  # unit id per variable of the traces
    refused: tuple[str, ...] = ()
    fallbacks: Fallbacks = field(default_factory=Fallbacks, repr=False)
    evidence: tuple[Constraints, tuple[tuple[str, int, int, int], ...]] | None = field(default=None, repr=False)

    def everything(self) -> np.ndarray:
        """The `keep` array that removes nothing."""
        return np.ones(self.size, dtype=bool)

    def count(self, keep: np.ndarray) -> PlanCost:
        """PlanCost of the network that keeps these units, by arithmetic alone.

        Args:
            keep: bool array of length `size`, indexed by unit id.

        Returns:
            Parameters and multiply-adds, equal to what counting the built network gives.
        """
        kept = self._kept(keep)
        return PlanCost(_total(self.tally.params, kept), _total(self.tally.macs, kept))

    def count_layers(self, keep: np.ndarray) -> dict[str, PlanCost]:
        """The same per layer (dotted module name), in the order of the parameters."""
        kept = self._kept(keep)
        params = _rows(self.tally.params, kept)
        macs = _rows(self.tally.macs, kept)
        totals: dict[str, list[int]] = {}
        for layer, value in zip(self.tally.param_layers, params, strict=True):
            totals.setdefault(layer, [0, 0])[0] += int(value)
        for layer, value in zip(self.tally.mac_layers, macs, strict=True):
            totals.setdefault(layer, [0, 0])[1] += int(value)
        return {layer: PlanCost(*pair) for layer, pair in totals.items()}

    def _kept(self, keep: np.ndarray) -> np.ndarray:
        if keep.shape != (self.size,) or keep.dtype != np.bool_:
            raise SurgeryError(f"keep has shape {keep.shape} and type {keep.dtype}; give {self.size} bools")
        present = keep.astype(np.int64)
        present[0] = 1
        ids = present[self.tally.ids]
        kept = np.add.reduceat(ids, self.tally.starts) if len(self.tally.starts) else np.zeros(0, np.int64)
        return np.append(kept, 1)


def _rows(rows: tuple[np.ndarray, np.ndarray], kept: np.ndarray) -> np.ndarray:
    static, which = rows
    return static * kept[which].prod(axis=1)


def _total(rows: tuple[np.ndarray, np.ndarray], kept: np.ndarray) -> int:
    return int(_rows(rows, kept).sum())
