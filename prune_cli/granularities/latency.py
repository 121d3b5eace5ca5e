"""What a smaller network will take: a table of layer times at a few widths on this device, interpolated.

The whole network is made at five widths, and each is timed twice: as it is, and layer by layer. A layer's time is
interpolated over its own multiply-adds (or parameters, for layers without products), what no layer accounts for
(activations, additions, the program itself) over the channels kept. At the five widths the prediction is exact.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli import measure, surgery
from prune_cli.plan import Cost, Plan

WIDTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
SECONDS = 0.5  # of layer timing per width, about
WARMUP, LEAST, MOST = 3, 5, 25  # forward passes


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
    dense: Mapping[str, Cost]
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
        shrunk = surgery.shrink(model, plan, keep)
        costs = shrunk.plan.count_layers(shrunk.keep)
        per_layer = layer_times(shrunk.model, image, [name for name in dense if name])
        for name in dense:
            parts[name].append(_part(costs[name], dense[name]))
            times[name].append(per_layer.get(name, 0.0))
        whole = measure.latency(shrunk.model, image, image.device)
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


def layer_times(model: nn.Module, image: Tensor, names: list[str]) -> dict[str, float]:
    """Median milliseconds that each named module takes itself, without the named modules inside it.

    Modules that are not called have no entry.
    """
    clocks: list[list[float]] = []  # of the named modules that are running: start, time spent in named ones inside
    passes: list[dict[str, float]] = []
    handles = []
    wanted = set(names)

    def enter(*_: Any) -> None:
        _synchronise(image.device)
        clocks.append([time.perf_counter(), 0.0])

    def leave(name: str) -> None:
        _synchronise(image.device)
        start, inside = clocks.pop()
        spent = time.perf_counter() - start
        passes[-1][name] = passes[-1].get(name, 0.0) + 1e3 * (spent - inside)
        if clocks:
            clocks[-1][1] += spent

    for name, module in model.named_modules():
        if name in wanted:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(lambda *_, name=name: leave(name)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with measure.evaluating(model), torch.inference_mode():
            began = time.perf_counter()
            while len(passes) < WARMUP + LEAST or (
                len(passes) < WARMUP + MOST and time.perf_counter() - began < SECONDS
            ):
                passes.append({})
                model(image)
    finally:
        torch.set_num_threads(threads)
        for handle in handles:
            handle.remove()
    timed = passes[WARMUP:]
    return {name: float(np.median([one[name] for one in timed])) for name in timed[0]}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _narrow(plan: Plan, fraction: float) -> np.ndarray:
    """Keeps the first part of every family, at least one unit."""
    keep = plan.everything()
    for family in plan.families:
        keep[family.units[max(1, round(fraction * len(family.units))) :]] = False
    return keep


def _width(keep: np.ndarray) -> float:
    """Fraction of the units kept."""
    return float(keep[1:].mean()) if len(keep) > 1 else 1.0


def _part(cost: Cost, dense: Cost) -> float:
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
