"""Milliseconds of a forward pass."""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune_cli.progress import track


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass; `throughput` is examples per second at the median."""

    median_ms: float
    p95_ms: float
    throughput: float
    batch_size: int
    device: str
    dtype: str
    threads: int
    repeats: int


# ------------------------------------------------------------------------------------------------ time


def latency(
    model: nn.Module,
    batch: Tensor,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    warmup: int = 5,
    repeats: int = 30,
) -> Latency:
    """Times forward passes in eval mode, each by itself, on a copy of the model.

    Args:
        model: the network; unchanged.
        batch: input (N, ...).
        device: where to run.
        dtype: floating point type of weights and input.
        threads: CPU threads of PyTorch while it runs.
        warmup: passes that are not timed.
        repeats: passes that are timed, at least 1.

    Returns:
        Median and 95th percentile in milliseconds, and examples per second at the median.
    """
    place = torch.device(device)
    twin = copy.deepcopy(model).to(place, dtype).eval()
    example = batch.to(place, dtype if batch.is_floating_point() else None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times = []
    try:
        with torch.inference_mode():
            for step in track(range(warmup + max(1, repeats)), f"timing batches of {len(batch)}"):
                synchronise(place)
                start = time.perf_counter()
                twin(example)
                synchronise(place)
                if step >= warmup:
                    times.append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    times.sort()
    median = statistics.median(times)
    return Latency(
        median_ms=median,
        p95_ms=times[math.ceil(0.95 * len(times)) - 1],
        throughput=1e3 * len(batch) / median,
        batch_size=len(batch),
        device=str(place),
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        repeats=len(times),
    )


def synchronise(device: torch.device) -> None:
    """Waits until a device has done what it was asked for; CPUs have."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
