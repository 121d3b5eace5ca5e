"""Latency of `StripeConv2d` against the dense convolution, by batch, size and part of the stripes removed.

Usage: python scripts/bench/stripe.py [--device cpu] [--batch 1 64] [--size 8 16 32] [--ratio 0.5 0.7 0.9] [--learn]

Both run in turns (A B A B); printed are medians, the ratio of speeds, the ratio of multiply-adds and the form that the
layer chose: fused products of stripes, or the dense kernel. With --learn a step is forward and backward; with --busy
the time is the process's own, not the clock's, for machines on which other programs run.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from prune_cli.layers.stripe_conv import StripeConv2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--size", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--ratio", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    width = arguments.channels
    dense = nn.Conv2d(width, width, 3, arguments.stride, 1, bias=False).to(arguments.device)
    print(
        f"{'batch':>5} {'size':>5} {'removed':>8} {'dense ms':>9} {'stripes ms':>11} {'speed-up':>9} {'macs ratio':>11}  form"
    )
    for batch in arguments.batch:
        for size in arguments.size:
            images = torch.randn(batch, width, size, size, generator=generator).to(arguments.device)
            for ratio in arguments.ratio:
                keep = torch.ones(width * 9, dtype=torch.bool)
                keep[torch.rand(width * 9, generator=generator).argsort()[: int(ratio * width * 9)]] = False
                small = StripeConv2d(dense, keep.view(width, 3, 3))
                first, second = turns([dense, small], images, arguments.rounds, arguments.learn, arguments.busy)
                fused = images.device.type == "cpu" and not arguments.learn and small._pays(images)
                part = small.weight.numel() / dense.weight.numel()
                print(
                    f"{batch:5} {size:5} {ratio:8.2f} {first:9.2f} {second:11.2f} {first / second:9.2f} {1 / part:11.2f}"
                    f"  {'stripes' if fused else 'dense'}",
                    flush=True,
                )


def turns(layers: list[nn.Module], images: torch.Tensor, rounds: int, learn: bool, busy: bool) -> list[float]:
    """Median milliseconds of each layer."""
    clock = time.process_time if busy else time.perf_counter
    repeats = 1 if images.shape[0] > 1 else 20
    times: list[list[float]] = [[] for _ in layers]
    with torch.set_grad_enabled(learn):
        for _ in range(rounds + 2):
            for layer, taken in zip(layers, times, strict=True):
                synchronise(images)
                start = clock()
                for _ in range(repeats):
                    out = layer(images)
                    if learn:
                        out.sum().backward()
                synchronise(images)
                taken.append(1e3 * (clock() - start) / repeats)
    return [statistics.median(taken[2:]) for taken in times]


def synchronise(images: torch.Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
