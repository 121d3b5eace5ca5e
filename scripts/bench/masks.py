"""Time of choosing all masks of VGG-16 (CIFAR) at each granularity, as a part of two training steps of 128 images.

Usage: python scripts/bench/masks.py [--device cpu] [--rounds 3] [--batch 128]

Mask update and training steps alternate; printed are medians and their ratio, which must stay below 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.kernel import Kernel
from prune_cli.granularities.n_m import NM
from prune_cli.granularities.pattern import Pattern
from prune_cli.granularities.stripe import Stripe
from prune_cli.models.vgg import vgg
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select

GRANULARITIES = {
    "element": Granularity(Element(), 0.8),
    "element global": Granularity(Element(), 0.8, scope="global"),
    "m4n2": Granularity(NM(), 0.5),
    "m8n1": Granularity(NM(8), 0.875),
    "stripe": Granularity(Stripe(), 0.7),
    "kernel": Granularity(Kernel(), 0.7),
    "pattern": Granularity(Pattern(), 0.8),
    "pattern fixed5": Granularity(Pattern("fixed5"), 0.7),
    "filter": Granularity(Filter(), 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = vgg(num_classes=10, in_shape=(3, 32, 32), depth=16).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(arguments.batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (arguments.batch,), device=device)
    criterion, example = Criterion(weights.l2), torch.zeros(1, 3, 32, 32, device=device)

    def timed(action: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def steps() -> None:
        for _ in range(2):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    timed(steps)
    print(f"{'granularity':>15} {'masks s':>9} {'two steps s':>12} {'ratio':>7}")
    for name, granularity in GRANULARITIES.items():
        masks, training = [], []
        for _ in range(arguments.rounds):
            masks.append(timed(lambda granularity=granularity: select(granularity, criterion, model, example)))
            training.append(timed(steps))
        first, second = statistics.median(masks), statistics.median(training)
        print(f"{name:>15} {first:9.3f} {second:12.3f} {first / second:7.3f}", flush=True)


if __name__ == "__main__":
    main()
