"""What distillation adds to an epoch: a teacher's logits from a table or live, features by hooks or by hand; A B A B,
medians of CPU seconds.

    python scripts/bench/distillation.py [--batch 64] [--images 1024] [--rounds 7] [--threads 1]

The student is a ResNet-20, its teacher a ResNet-56, on made-up images of 3 x 32 x 32; all arms train by `fit`. Ratios are to
a plain epoch; for features, to the same loss in a loop that calls the networks stage by stage. Marks: 1.1 for logits from a
table, 1.05 for features by hooks. Making the table is no part of an epoch, and is printed beside.
"""

from __future__ import annotations

import argparse
import copy
import functools
import re
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.data.fake import fake
from prune_cli.distillation.attention_transfer import attention, attention_transfer
from prune_cli.distillation.distillation import Term
from prune_cli.distillation.lessons import logits_of
from prune_cli.distillation.losses import hinton
from prune_cli.distillation.objective import Objective, Taught, prepared
from prune_cli.models.resnet_cifar import CifarResNet, resnet_cifar
from prune_cli.training.fit import fit
from prune_cli.training.lr_schedules import constant

SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
SOFT = Term(hinton(), "dense")
MAPS = Term(attention_transfer, "dense", weight=10.0, features=("layer1", "layer2", "layer3"))


def plain(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def staged(model: CifarResNet, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and the ends of the stages, as a user writes it for this one network."""
    first = model.layer1(F.relu(model.bn1(model.conv1(images))))
    second = model.layer2(first)
    third = model.layer3(second)
    return model.linear(model.avgpool(third).flatten(1)), [first, second, third]


def by_hand(teacher: CifarResNet, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """`MAPS` and the labels, without hooks."""
    with torch.no_grad():
        _, taught = staged(teacher, images)
    assert isinstance(model, CifarResNet)
    logits, own = staged(model, images)
    differences = [
        torch.linalg.vector_norm(attention(a, 2.0) - attention(b, 2.0), dim=1).mean()
        for a, b in zip(own, taught, strict=True)
    ]
    return F.cross_entropy(logits, labels) + 10.0 * torch.stack(differences).sum() / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", default="", help="those whose names match, such as 'plain|table'")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    data = fake(train=arguments.images, test=10, val=0, crop_padding=0, flip=True)
    student, teacher = (resnet_cifar(num_classes=10, in_shape=(3, 32, 32), depth=depth) for depth in (20, 56))
    teacher.eval().requires_grad_(False)
    began = time.perf_counter()
    rows = logits_of(teacher, data.views, 0, lowered=False, channels_last=False, what="")
    table = torch.cat(list(rows))
    print(f"table of {len(table)} rows: {time.perf_counter() - began:.1f} s, {table.nbytes / 1e6:.2f} MB")

    def taught(term: Term, own: nn.Module, table: Tensor | None = None) -> Objective:
        ready = prepared(term, own, teacher, torch.zeros(2, 3, 32, 32), key="distillation", seed=0)
        return Objective(own, [Taught(ready.loss, ready.weight, teacher, ready.names, table)], term.weights[1], 0.0)

    losses: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
        "plain": lambda own: plain,
        "logits from a table": lambda own: taught(SOFT, own, table),
        "logits, live": lambda own: taught(SOFT, own),
        "features by hand": lambda own: functools.partial(by_hand, teacher),
        "features by hooks": lambda own: taught(MAPS, own),
        "plain again": lambda own: plain,
    }

    def epoch(name: str) -> float:
        own = copy.deepcopy(student)
        loss = losses[name](own)
        batches = data.train(arguments.batch, 0)
        given = loss.batches(batches) if isinstance(loss, Objective) else batches
        began = time.process_time()  # with one thread: what else the machine does matters less
        fit(own, given, loss, optimizer=SGD, lr_schedule=constant, epochs=1)
        return time.process_time() - began

    losses = {name: make for name, make in losses.items() if re.search(arguments.arms, name)}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for name in losses:
        epoch(name)
    for _ in range(arguments.rounds):
        for name in losses:
            times[name].append(epoch(name))
    print(
        f"resnet20 taught by resnet56, {arguments.images} images in batches of {arguments.batch}, {arguments.threads} threads"
    )
    for name in losses:
        base = "features by hand" if name == "features by hooks" else "plain"
        ratios = [ours / theirs for ours, theirs in zip(times[name], times[base], strict=True)]
        print(
            f"{name:<20} {statistics.median(times[name]):6.2f} s  {statistics.median(ratios):.3f} of {base}  "
            f"(from {min(ratios):.3f} to {max(ratios):.3f}), fastest to fastest {min(times[name]) / min(times[base]):.3f}"
        )


if __name__ == "__main__":
    main()
