"""Datasets that fit in memory: uint8 images that live on the device and are augmented there in batches.

`from_arrays` makes one from pixels and labels; a user's own dataset function may call it too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from prune_cli.data.augment import Augment, Draws, affine, draw_epoch, in_view, normalise, shift_and_flip
from prune_cli.data.dataset import SPLITS, Batch, Shard
from prune_cli.data.splits import (
    Amount,
    balanced,
    check_batch,
    dealt,
    evaluated_at_once,
    held_out_count,
    hold_out,
    shard_bounds,
    steps,
)
from prune_cli.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 `(N, C, H, W)` and labels int64 `(N,)`, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Split:
        chosen = torch.from_numpy(indices).to(self.labels.device)
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Data:
    """A dataset in memory; implements `dataset.Dataset`. Made by `from_arrays`.

    Attributes:
        published: images per split of the dataset that made-up images stand in for, where that is known.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    splits: Mapping[str, Split]
    augment: Augment = field(default_factory=Augment)
    split_seed: int = 0
    limit_batches: int | None = None
    published: Mapping[str, int] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.splits["train"].images.shape[1:]
        return channels, height, width

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(split) for name, split in self.splits.items()}

    @property
    def has_val(self) -> bool:
        return "val" in self.splits

    @property
    def device(self) -> torch.device:
        return self.splits["train"].images.device

    def to(self, device: torch.device | str) -> Data:
        """A copy whose images and labels live on `device`."""
        moved = {name: Split(s.images.to(device), s.labels.to(device)) for name, s in self.splits.items()}
        return replace(self, splits=moved)

    @property
    def views(self) -> ArrayViews:
        """Every training image in every augmentation; see `dataset.Views`."""
        return ArrayViews(self)

    def train(self, batch_size: int, seed: int, *, shard: Shard = (0, 1)) -> ArrayBatches:
        """Shuffled, augmented batches of the train split; see `dataset.Dataset.train`."""
        check_batch(batch_size, len(self.splits["train"]), shard)
        return ArrayBatches(self, batch_size, seed, shard)

    def evaluation(self, split: str, batch_size: int, *, shard: Shard = (0, 1)) -> ArrayLoader:
        """The images of a split in order; see `dataset.Dataset.evaluation`."""
        check_split(self.name, split, self.splits)
        batch_size = evaluated_at_once(batch_size, self.shape, self.limit_batches)
        check_batch(batch_size, len(self.splits[split]), shard)
        return ArrayLoader(self, self.splits[split], batch_size, shard)

    def calibration(self, n: int, batch_size: int, *, shard: Shard = (0, 1)) -> ArrayLoader:
        """`n` fixed training images, balanced over the classes; see `dataset.Dataset.calibration`."""
        train = self.splits["train"]
        chosen = balanced(train.labels.cpu().numpy(), n, self.split_seed)
        check_batch(batch_size, len(chosen), (0, 1))
        return ArrayLoader(self, train.take(dealt(chosen, batch_size, self.limit_batches, shard)), batch_size, (0, 1))

    def limit(self, batches: int | None) -> Data:
        """A copy that stops every epoch and evaluation after `batches` batches; one batch to evaluate on is a few images."""
        check_limit(batches)
        return replace(self, limit_batches=batches)


@dataclass(frozen=True, eq=False)
class ArrayBatches:
    """Training batches from memory; implements `dataset.Batches`."""

    data: Data
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
        train, augment = self.data.splits["train"], self.data.augment
        scale, shift = affine(self.data.mean, self.data.std, self.data.device)
        for part in self._draws(epoch, start):
            images = shift_and_flip(train.images.index_select(0, part.order), part, augment)
            yield normalise(images, scale, shift), train.labels.index_select(0, part.order)

    def rows(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Beside every batch, where its images stand among the dataset's views; see `dataset.Numbered`."""
        total = len(self.data.splits["train"])
        for part in self._draws(epoch, start):
            yield part.views(self.data.augment) * total + part.order

    def _draws(self, epoch: int, start: int) -> Iterator[Draws]:
        """The draws of each batch from step `start` on."""
        total = len(self.data.splits["train"])
        draws = draw_epoch(total, self.data.augment, self.seed, epoch).to(self.data.device)
        for step in range(start, len(self)):
            yield draws.part(*shard_bounds(step, self.batch_size, total, self.shard))


@dataclass(frozen=True, eq=False)
class ArrayViews:
    """View after view of all training images; implements `dataset.Views`."""

    data: Data

    def __len__(self) -> int:
        return self.data.augment.views * len(self.data.splits["train"])

    @property
    def fingerprint(self) -> str:
        data = self.data
        return hashlib.sha256(repr((data.fingerprint, data.augment, data.mean, data.std)).encode()).hexdigest()

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Tensor]:
        """At most `batch_size` images at a time, all of one view."""
        train, augment = self.data.splits["train"], self.data.augment
        scale, shift = affine(self.data.mean, self.data.std, self.data.device)
        while start < len(self):
            view, first = divmod(start, len(train))
            order = torch.arange(first, min(first + batch_size, len(train)), device=self.data.device)
            draws = in_view(view, order, augment)
            yield normalise(shift_and_flip(train.images.index_select(0, order), draws, augment), scale, shift)
            start += len(order)


@dataclass(frozen=True, eq=False)
class ArrayLoader:
    """Batches of a split in order; implements `dataset.Loader`."""

    data: Data
    split: Split
    batch_size: int
    shard: Shard

    def __len__(self) -> int:
        return steps(len(self.split), self.batch_size, self.data.limit_batches)

    def __iter__(self) -> Iterator[Batch]:
        scale, shift = affine(self.data.mean, self.data.std, self.data.device)
        for step in range(len(self)):
            start, stop = shard_bounds(step, self.batch_size, len(self.split), self.shard)
            yield normalise(self.split.images[start:stop], scale, shift), self.split.labels[start:stop]


def check_split(dataset: str, split: str, there: Mapping[str, object]) -> None:
    """Raises ConfigError unless `split` is one of those that are `there`."""
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is unknown; choose train, val or test")
    if split not in there:
        raise ConfigError(f"{dataset} has no {split} split: hold some training images out with dataset.{split}=0.1")


def check_memory(name: str, images: int, shape: tuple[int, int, int], value_bytes: int = 1) -> None:
    """Refuses images that no memory of this machine holds, before they are made.

    Args:
        shape: channels, height and width of each.
        value_bytes: of a pixel's channel while they are made.

    Raises:
        ConfigError: says how much it would be, and how much there is.
    """
    wanted = images * shape[0] * shape[1] * shape[2] * value_bytes
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > there:
        raise ConfigError(
            f"{name}: {images} images of {' x '.join(map(str, shape))} need {wanted / 1e9:,.0f} GB of memory, and this "
            f"machine has {there / 1e9:,.0f} GB; choose smaller ones (dataset.image_size, dataset.shape) or fewer"
        )


def check_limit(batches: int | None) -> None:
    """Raises ConfigError unless `batches` is None or at least 1."""
    if batches is not None and batches < 1:
        raise ConfigError(f"limit_batches={batches}: must be at least 1, or null for no limit")


def from_arrays(
    name: str,
    train: Split,
    test: Split,
    *,
    classes: Sequence[str],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    val: Amount | Split = 0,
    split_seed: int = 0,
    augment: Augment | None = None,
) -> Data:
    """A dataset from pixels and labels in memory.

    Args:
        name: written to results.
        train, test: uint8 images `(N, C, H, W)` and int64 labels in [0, len(classes)).
        classes: their names.
        mean, std: per channel, of pixels in [0, 1].
        val: how much of `train` is held out, stratified: a fraction in [0, 1) or a number of images; or a
            split.
        split_seed: chooses the held-out and the calibration images.
        augment: of training batches; None: nothing.

    Raises:
        DataError: arrays of a wrong type or shape, labels out of range, fewer than two classes, an empty
        split. ConfigError: `val` or `augment` do not fit.
    """
    splits = {"train": train, "test": test}
    if isinstance(val, Split):
        splits = {"train": train, "val": val, "test": test}
    _check_arrays(name, splits, len(classes), len(mean))
    if not isinstance(val, Split):
        kept, held = hold_out(train.labels.numpy(), held_out_count(val, len(train), "dataset.val"), split_seed)
        if len(held):
            splits = {"train": train.take(kept), "val": train.take(held), "test": test}
    augment = augment or Augment()
    channels, height, width = train.images.shape[1:]
    augment.check((channels, height, width))
    return Data(
        name=name,
        classes=tuple(classes),
        mean=mean,
        std=std,
        fingerprint=_fingerprint(splits, classes),
        splits=splits,
        augment=augment,
        split_seed=split_seed,
    )


def _check_arrays(name: str, splits: Mapping[str, Split], num_classes: int, channels: int) -> None:
    if num_classes < 2:
        raise DataError(f"{name} has {num_classes} class; classification needs at least two")
    shape = splits["train"].images.shape[1:]
    for split, part in splits.items():
        images, labels = part.images, part.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise DataError(
                f"{name}: {split} images are {images.dtype} {tuple(images.shape)}; "
                f"need uint8 (N, {', '.join(map(str, shape))})"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
            raise DataError(
                f"{name}: {split} labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images; "
                "need one int64 each, and at least one image"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
            raise DataError(f"{name}: a {split} label is outside [0, {num_classes})")
    if shape[0] != channels:
        raise DataError(f"{name}: images of {shape[0]} channels, but mean and std for {channels}")


def _fingerprint(splits: Mapping[str, Split], classes: Sequence[str]) -> str:
    digest = hashlib.sha256(repr(tuple(classes)).encode())
    for name, split in splits.items():
        digest.update(f"{name} {tuple(split.images.shape)}".encode())
        digest.update(split.images.contiguous().numpy().data)
        digest.update(split.labels.contiguous().numpy().data)
    return digest.hexdigest()
