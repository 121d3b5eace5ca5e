"""What a smaller network will take: a table of layer times at a few widths on this device, interpolated.

The whole network is made at five widths, and each is timed twice: as it is, and layer by layer. A layer's time is
interpolated over its own multiply-adds (or parameters, for layers without products), what no layer accounts for
(activations, additions, the program itself) over the channels kept. At the five widths the prediction is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from prune_cli.measure import latency
from prune_cli.measure.layer_times import layer_times
from prune_cli.structure import surgery
from prune_cli.structure.plan import Plan, PlanCost

WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Prediction:
    """Milliseconds for one image: the median, and the 95th percentile to be expected from the table's own."""

    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Table:
    """Times at a few widths.

    Attributes:
        plan: the channel plan whose candidates can be predicted.
        dense: cost per layer of the whole network.
        layers: layer -> (fractions of its cost, ascending; milliseconds).
        rest: (fractions of the channels, ascending; milliseconds that no layer accounts for).
        spread: (the same fractions; 95th percentile over median of the whole forward pass).
    """

    plan: Plan
    dense: Mapping[str, PlanCost]
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]
    rest: tuple[np.ndarray, np.ndarray]
    spread: tuple[np.ndarray, np.ndarray]

    def predict(self, keep: np.ndarray) -> Prediction:
        """The time of the network that keeps these units (bool per unit id)."""
        costs = self.plan.count_layers(keep)
        width = _width(keep)
        total = float(np.interp(width, *self.rest)) + sum(
            float(np.interp(_part(costs[name], self.dense[name]), *curve)) for name, curve in self.layers.items()
        )
        return Prediction(total, total * float(np.interp(width, *self.spread)))


def measured(model: nn.Module, plan: Plan, image: Tensor) -> Table:
    """Times the network at five widths, on the image's device, in float32 and one thread on a CPU.

    Args:
        model: the whole network; unchanged.
        plan: from `channels.analyse`.
        image: a batch of one.
    """
    dense = plan.count_layers(plan.everything())
    parts: dict[str, list[float]] = {name: [] for name in dense}
    times: dict[str, list[float]] = {name: [] for name in dense}
    widths, totals, spreads = [], [], []
    for fraction in WIDTHS:
        keep = _narrow(plan, fraction)
        shrunk = surgery.remove_units(model, plan, keep)
        costs = shrunk.plan.count_layers(shrunk.keep)
        per_layer = layer_times(shrunk.model, image, [name for name in dense if name])
        for name in dense:
            parts[name].append(_part(costs[name], dense[name]))
            times[name].append(per_layer.get(name, 0.0))
        whole = latency.latency(shrunk.model, image, image.device)
        widths.append(_width(shrunk.keep))
        totals.append(whole.median_ms)
        spreads.append(whole.p95_ms / whole.median_ms)
    layers = {name: _curve(parts[name], times[name]) for name in dense if any(times[name])}
    known = [
        sum(float(np.interp(parts[name][index], *curve)) for name, curve in layers.items())
        for index in range(len(WIDTHS))
    ]
    rest = _means(widths, [total - part for total, part in zip(totals, known, strict=True)])
    return Table(plan, dense, layers, rest, _means(widths, spreads))


def _narrow(plan: Plan, fraction: float) -> np.ndarray:
    """Keeps the first part of every family, at least one unit."""
    keep = plan.everything()
    for family in plan.families:
        keep[family.units[max(1, round(fraction * len(family.units))) :]] = False
    return keep


def _width(keep: np.ndarray) -> float:
    """Fraction of the units kept."""
    return float(keep[1:].mean()) if len(keep) > 1 else 1.0


def _part(cost: PlanCost, dense: PlanCost) -> float:
    """Fraction of a layer's products that is left, or of its parameters where it has no products."""
    return cost.macs / dense.macs if dense.macs else cost.params / max(dense.params, 1)


def _curve(parts: list[float], times: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Times over ascending fractions, never falling: a wider layer that measures faster is noise."""
    at, means = _means(parts, times)
    return at, np.maximum.accumulate(means)


def _means(at: list[float], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ascending places and the mean of the values there."""
    places, index = np.unique(at, return_inverse=True)
    return places, np.bincount(index, weights=values) / np.bincount(index)
