"""One training step through `fit` against a loop written by hand: same network, same batches, A B A B, medians.

    python scripts/bench/step.py [--model resnet20|vgg16] [--batch 64] [--steps 12] [--rounds 7] [--threads 2]

Prints three ratios: `fit` without masks, with element masks on every layer, and what a second run of the hand-written
loop gives (the noise of this machine). Marks: 1.03 without masks, 1.06 with.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.models.vgg import vgg
from prune_cli.training.fit import fit
from prune_cli.training.lr_schedules import constant

SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)


class Fixed:
    """The same random batches every epoch."""

    def __init__(self, steps: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(0, 10, (batch,), generator=generator))
            for _ in range(steps)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.batches[start:]


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def by_hand(model: nn.Module, data: Fixed) -> None:
    """What a user would write; it looks at the loss of every step, as any progress line does."""
    model.train()
    optimizer = SGD(model.parameters())
    total = 0.0
    for images, labels in data.batches:
        value = F.cross_entropy(model(images), labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += value.item()


def by_fit(model: nn.Module, data: Fixed, masks: dict[str, Tensor] | None) -> None:
    fit(model, data, loss, optimizer=SGD, lr_schedule=constant, epochs=1, masks=masks)


def seconds(run: Callable[[nn.Module], None], model: nn.Module) -> float:
    own = copy.deepcopy(model)
    began = time.perf_counter()
    run(own)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet20", "vgg16"), default="resnet20")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    build = {"resnet20": functools.partial(resnet_cifar, depth=20), "vgg16": functools.partial(vgg, depth=16)}
    model = build[arguments.model](num_classes=10, in_shape=(3, 32, 32))
    data = Fixed(arguments.steps, arguments.batch)
    masks = {
        name: torch.rand_like(parameter) > 0.8 for name, parameter in model.named_parameters() if parameter.dim() > 1
    }
    runs: dict[str, Callable[[nn.Module], None]] = {
        "by hand": lambda own: by_hand(own, data),
        "fit": lambda own: by_fit(own, data, None),
        "fit with masks": lambda own: by_fit(own, data, masks),
        "by hand again": lambda own: by_hand(own, data),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(copy.deepcopy(model))
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, model))
    print(f"{arguments.model}, batch {arguments.batch}, {arguments.steps} steps, {arguments.threads} threads")
    for name in runs:
        ratios = [ours / theirs for ours, theirs in zip(times[name], times["by hand"], strict=True)]
        print(f"{name:<16} median ratio {statistics.median(ratios):.3f}  (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
