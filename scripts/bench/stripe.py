"""Latency of `StripeConv2d` with 70 % of its stripes removed against the dense convolution, 64 channels, batch 64.

Usage: python scripts/bench/stripe.py [--device cpu] [--size 32] [--ratio 0.7] [--rounds 7]

Both run in turns (A B A B); printed are medians, the ratio of speeds, and the ratio of multiply-adds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from prune_cli.stripe_conv import StripeConv2d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--size", type=int, nargs="*", default=[8, 16, 32])
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--ratio", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    width = arguments.channels
    dense = nn.Conv2d(width, width, 3, arguments.stride, 1, bias=False).to(arguments.device)
    print(f"{'size':>5} {'removed':>8} {'dense ms':>9} {'stripes ms':>11} {'speed-up':>9} {'macs ratio':>11}")
    for size in arguments.size:
        images = torch.randn(arguments.batch, width, size, size, generator=generator).to(arguments.device)
        for ratio in arguments.ratio:
            scores = torch.rand(width * 9, generator=generator)
            keep = torch.ones(width * 9, dtype=torch.bool)
            keep[scores.argsort()[: int(ratio * width * 9)]] = False
            small = StripeConv2d(dense, keep.view(width, 3, 3))
            times: dict[str, list[float]] = {"dense": [], "small": []}
            with torch.inference_mode():
                for _ in range(arguments.rounds + 2):
                    for name, layer in (("dense", dense), ("small", small)):
                        if images.is_cuda:
                            torch.cuda.synchronize()
                        start = time.perf_counter()
                        layer(images)
                        if images.is_cuda:
                            torch.cuda.synchronize()
                        times[name].append(1e3 * (time.perf_counter() - start))
            first, second = (statistics.median(times[name][2:]) for name in ("dense", "small"))
            part = small.weight.numel() / dense.weight.numel()
            print(
                f"{size:5} {ratio:8.2f} {first:9.2f} {second:11.2f} {first / second:9.2f} {1 / part:11.2f}", flush=True
            )


if __name__ == "__main__":
    main()
