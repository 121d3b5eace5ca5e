"""What channel permutation keeps, and what the time buys: swaps, windows of 8, with escapes, over a whole network.

Usage: python scripts/bench/permutation.py [--model resnet50] [--device cpu] [--escapes 0 20] [--weights FILE]
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torchvision
from torch import nn

from prune_cli.files.weights import load_weights
from prune_cli.permutation.network import permute
from prune_cli.structure.follow import analyse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", help="a torchvision classifier")
    parser.add_argument("--weights", help="file of weights; random ones (the hardest case) without")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--escapes", type=int, nargs="*", default=[0])
    parser.add_argument("--windows", type=int, nargs="*", default=[0, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = torchvision.models.get_model(arguments.model).eval()
    if arguments.weights:
        load_weights(model, arguments.weights)
    patterns = {
        f"{name}.weight": (4, 2) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    print(
        f"{'window':>6} {'escapes':>7} {'seconds':>8} {'kept before':>12} {'kept after':>12} {'gain %':>7} {'efficacy %':>10}"
    )
    for window in arguments.windows:
        for escapes in arguments.escapes if window else [0]:
            twin = copy.deepcopy(model).to(arguments.device)
            plan = analyse(twin, torch.zeros(1, 3, 224, 224, device=arguments.device))
            start = time.perf_counter()
            layers = permute(twin, plan, patterns, window=window, escapes=escapes).layers
            seconds = time.perf_counter() - start
            before, after, bound = (
                sum(getattr(layer, key) for layer in layers) for key in ("before", "after", "bound")
            )
            gain, efficacy = 100 * (after / before - 1), 100 * (after - before) / (bound - before)
            print(
                f"{window:6} {escapes:7} {seconds:8.1f} {before:12.1f} {after:12.1f} {gain:7.3f} {efficacy:10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
