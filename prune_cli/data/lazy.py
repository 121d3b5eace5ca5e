"""Datasets too large for memory: images are decoded by worker processes, batch by batch.

The same interface and the same promise as `arrays`: what a batch holds depends on the seed, the epoch and
the step only, never on the number of workers, so an epoch can be entered in its middle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from prune_cli.data.arrays import check_limit, check_split
from prune_cli.data.augment import affine, normalise
from prune_cli.data.dataset import Batch, Shard
from prune_cli.data.files import Files, at_most, centre, read_image, to_pixels
from prune_cli.data.splits import balanced, check_batch, dealt, evaluated_at_once, generator, shard_bounds, steps
from prune_cli.errors import ConfigError, DataError

_RATIO = (3 / 4, 4 / 3)  # width over height of a random crop, before it is resized
_ATTEMPTS = 10


@dataclass(frozen=True)
class Crops:
    """How an image becomes a square of `size` pixels.

    Attributes:
        size: pixels of a side.
        resize: pixels of the shorter side before an evaluation image is cut from the middle.
        scale: least and largest share of the area that a random training crop covers.
        flip: mirror training images left to right, with probability 1/2.
    """

    size: int = 224
    resize: int = 256
    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    def check(self) -> None:
        """Raises ConfigError, in one line, if a value is out of range."""
        if not 1 <= self.size <= self.resize:
            raise ConfigError(f"dataset.image_size={self.size}, resize={self.resize}: need 1 <= image_size <= resize")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"dataset.crop_scale={list(self.scale)}: need 0 < least <= largest <= 1")


@dataclass(frozen=True, eq=False)
class LazyData:
    """A dataset of files; implements `dataset.Dataset`.

    The fingerprint covers names, sizes and labels of the files: reading all the pixels would take hours.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    splits: Mapping[str, Files]
    crops: Crops
    workers: int
    split_seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    limit_batches: int | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.crops.size, self.crops.size

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(files) for name, files in self.splits.items()}

    @property
    def has_val(self) -> bool:
        return "val" in self.splits

    def to(self, device: torch.device | str) -> LazyData:
        """A copy whose batches are sent to `device`."""
        return replace(self, device=torch.device(device))

    @property
    def views(self) -> None:
        """Crops of any size and shape cannot be listed."""
        return None

    def train(self, batch_size: int, seed: int, *, shard: Shard = (0, 1)) -> LazyBatches:
        """Shuffled batches of random crops; see `dataset.Dataset.train`."""
        check_batch(batch_size, len(self.splits["train"]), shard)
        return LazyBatches(self, batch_size, seed, shard)

    def evaluation(self, split: str, batch_size: int, *, shard: Shard = (0, 1)) -> LazyLoader:
        """Centre crops of a split in order; see `dataset.Dataset.evaluation`."""
        check_split(self.name, split, self.splits)
        batch_size = evaluated_at_once(batch_size, self.shape, self.limit_batches)
        check_batch(batch_size, len(self.splits[split]), shard)
        return LazyLoader(self, self.splits[split], batch_size, shard)

    def calibration(self, n: int, batch_size: int, *, shard: Shard = (0, 1)) -> LazyLoader:
        """Centre crops of `n` fixed training images; see `dataset.Dataset.calibration`."""
        train = self.splits["train"]
        chosen = balanced(train.labels, n, self.split_seed)
        check_batch(batch_size, len(chosen), (0, 1))
        return LazyLoader(self, train.take(dealt(chosen, batch_size, self.limit_batches, shard)), batch_size, (0, 1))

    def limit(self, batches: int | None) -> LazyData:
        """A copy that stops every epoch and evaluation after `batches` batches; one batch to evaluate on is a few images."""
        check_limit(batches)
        return replace(self, limit_batches=batches)


@dataclass(frozen=True, eq=False)
class LazyBatches:
    """Training batches from files; implements `dataset.Batches`."""

    data: LazyData
    batch_size: int
    seed: int
    shard: Shard

    def __len__(self) -> int:
        return steps(len(self.data.splits["train"]), self.batch_size, self.data.limit_batches)

    def size(self, step: int) -> int:
        """Images in the whole batch of `step`, over all shards."""
        return min(self.batch_size, len(self.data.splits["train"]) - step * self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on."""
        train = self.data.splits["train"]
        order = generator("order", self.seed, epoch).permutation(len(train))
        bounds = [shard_bounds(step, self.batch_size, len(train), self.shard) for step in range(start, len(self))]
        reader = _Reader(train, self.data.channels, self.data.crops, (self.seed, epoch))
        return _batches(self.data, reader, [order[first:last] for first, last in bounds])


@dataclass(frozen=True, eq=False)
class LazyLoader:
    """Batches of some files in order; implements `dataset.Loader`."""

    data: LazyData
    files: Files
    batch_size: int
    shard: Shard

    def __len__(self) -> int:
        return steps(len(self.files), self.batch_size, self.data.limit_batches)

    def __iter__(self) -> Iterator[Batch]:
        bounds = [shard_bounds(step, self.batch_size, len(self.files), self.shard) for step in range(len(self))]
        reader = _Reader(self.files, self.data.channels, self.data.crops, None)
        return _batches(self.data, reader, [np.arange(first, last) for first, last in bounds])


@dataclass(frozen=True, eq=False)
class _Reader(TorchDataset[tuple[Tensor, Tensor] | str]):
    """Whole batches of uint8 images by their indices; random crops if `draw` gives (seed, epoch).

    An error comes back as its message: raised in a worker it would be wrapped in a traceback.
    """

    files: Files
    channels: int
    crops: Crops
    draw: tuple[int, int] | None

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor] | str:
        size = self.crops.size
        pixels = np.empty((len(indices), self.channels, size, size), dtype=np.uint8)
        try:
            for row, index in zip(pixels, indices.tolist(), strict=True):
                image = read_image(self.files.folder / self.files.paths[index], self.channels)
                if self.draw is None:
                    image = centre(image, self.crops.resize, size)
                else:
                    image = random_crop(image, self.crops, generator("crop", *self.draw, index))
                row[:] = to_pixels(image)
        except DataError as error:
            return str(error)
        return torch.from_numpy(pixels), torch.from_numpy(self.files.labels[indices])


def random_crop(image: Image.Image, crops: Crops, rng: np.random.Generator) -> Image.Image:
    """A random part of the image, resized and perhaps mirrored (Szegedy et al., arXiv:1409.4842, 6).

    The part covers a share of the area that is uniform in `crops.scale`, with a width over height that is
    log-uniform in [3/4, 4/3]; if no such part fits in ten attempts, the largest one in the middle is taken.
    """
    width, height = image.size
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*crops.scale)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            break
    else:
        w, h = min(width, round(height * _RATIO[1])), min(height, round(width / _RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    image = image.crop((left, top, left + w, top + h))
    image = image.resize((crops.size, crops.size), Image.Resampling.BILINEAR)
    if crops.flip and rng.integers(0, 2):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _batches(data: LazyData, reader: _Reader, indices: Sequence[np.ndarray]) -> Iterator[Batch]:
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=indices,  # type: ignore[arg-type]  # one item is a whole batch
        num_workers=at_most(data.workers),
        pin_memory=data.device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # else the global generator would move
    )
    scale, shift = affine(data.mean, data.std, data.device)
    for batch in loader:
        if isinstance(batch, str):
            raise DataError(batch)
        images, labels = (part.to(data.device, non_blocking=True) for part in batch)
        yield normalise(images, scale, shift), labels
