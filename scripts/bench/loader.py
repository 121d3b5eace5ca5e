"""Images per second of the on-device loader against DataLoader + torchvision transforms, in turns.

    python scripts/bench/loader.py [--images 20000] [--rounds 3] [--device cpu] [--threads 1]

Both give float32 batches of made-up 3 x 32 x 32 images: zero padding by 4, random crop, random flip,
normalisation. The DataLoader has two workers that stay alive; the on-device loader has the main process's
threads, one unless told otherwise. Each side is warmed up by one epoch. Prints the medians and the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout without installing it

from prune_cli.data.fake import fake

BATCH = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Pictures(Dataset[tuple[Tensor, int]]):
    """What torchvision's CIFAR10 does: an array to a PIL image, then the usual transforms."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def rate(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Images per second until the last batch is on the device."""
    start, images = time.perf_counter(), 0
    for x, y in batches:
        images += len(x.to(device, non_blocking=True))
        y.to(device, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="per epoch")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the main process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)

    data = fake(train=arguments.images, val=0, flip=True, mean=MEAN, std=STD)
    train = data.splits["train"]
    theirs = DataLoader(
        Pictures(train.images, train.labels),
        batch_size=BATCH,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    batches = data.to(device).train(BATCH, seed=0)
    sides: dict[str, Callable[[int], Iterable[tuple[Tensor, Tensor]]]] = {
        "on-device loader": batches.epoch,
        "DataLoader, 2 workers": lambda _: theirs,
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.rounds + 1):
        for name, epoch in sides.items():
            measured = rate(epoch(turn), device)
            if turn:  # the first turn warms up
                rates[name].append(measured)
                print(f"{name:22} {measured:10,.0f} images/s")
    ours, other = (statistics.median(values) for values in rates.values())
    print(f"medians: {ours:,.0f} and {other:,.0f} images/s; ratio {ours / other:.1f} (target: at least 10)")


if __name__ == "__main__":
    main()
