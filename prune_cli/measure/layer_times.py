"""Milliseconds of every layer of a network by itself."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.measure.latency import synchronise
from prune_cli.progress import busy
from prune_cli.structure import modes

SECONDS = 0.5  # of layer timing per width, about
WARMUP, LEAST, MOST = 3, 5, 25  # forward passes


@busy("timing layers")
def layer_times(model: nn.Module, image: Tensor, names: list[str]) -> dict[str, float]:
    """Median milliseconds that each named module takes itself, without the named modules inside it.

    Modules that are not called have no entry.
    """
    clocks: list[list[float]] = []  # of the named modules that are running: start, time spent in named ones inside
    passes: list[dict[str, float]] = []
    handles = []
    wanted = set(names)

    def enter(*_: Any) -> None:
        synchronise(image.device)
        clocks.append([time.perf_counter(), 0.0])

    def leave(name: str) -> None:
        synchronise(image.device)
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
        with modes.evaluating(model), torch.inference_mode():
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
