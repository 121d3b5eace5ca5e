"""What every dataset offers to the stages: the interface, and nothing that implements it.

A dataset is immutable. It hands out batches `(x, y)`: `x` float32 `(B, C, H, W)`, normalised, and `y` int64
`(B,)`, both on the dataset's device. `arrays.Data` keeps all images in memory, `lazy.LazyData` decodes them
in workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Any]
"""Images and their labels; a loss may want more than labels, as long as it has their length."""
Loss = Callable[[nn.Module, Any, Any], Tensor]
"""(model, images, labels) -> what a batch costs, a scalar: the mean over its images."""
Shard = tuple[int, int]  # (rank, world): the share of every batch that one of several processes works on

SPLITS = ("train", "val", "test")


class Batches(Protocol):
    """Shuffled, augmented training batches.

    The order of an epoch and every augmentation draw are pure functions of the seed, the epoch and the
    place in the epoch. They are drawn for the whole batch and then sliced by shard, so that two processes
    together see exactly what one would.
    """

    def __len__(self) -> int:
        """Steps per epoch; the last batch may be smaller than the others, none is dropped."""
        ...

    def size(self, step: int) -> int:
        """Images in the whole batch of `step`, over all shards: the weight of a mean over shards."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on: bit for bit those of the full epoch."""
        ...


@runtime_checkable
class Numbered(Batches, Protocol):
    """Batches of a dataset that can list its `Views`."""

    def rows(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Beside every batch of `epoch`: int64 `(B,)`, the place of each of its images among the views."""
        ...


class Views(Protocol):
    """The training images in every way in which they may be augmented, where these ways can be listed."""

    def __len__(self) -> int:
        """Training images times ways."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the numbers in them."""
        ...

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Tensor]:
        """All of them in order from place `start` on, as training batches have them."""
        ...


class Loader(Protocol):
    """Batches in a fixed order without augmentation; may be iterated many times."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


class Dataset(Protocol):
    """An image classification dataset with train, test and perhaps val splits."""

    @property
    def name(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a batch's images."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels scaled to [0, 1]; what batches are normalised with."""
        ...

    @property
    def std(self) -> tuple[float, ...]: ...

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content and of which image is in which split."""
        ...

    @property
    def sizes(self) -> dict[str, int]:
        """Images per split; no entry for a split that is not there."""
        ...

    @property
    def has_val(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device | str) -> Dataset:
        """The same dataset, with its batches on `device`."""
        ...

    @property
    def views(self) -> Views | None:
        """Every training image in every augmentation; None where these cannot be listed."""
        ...

    def train(self, batch_size: int, seed: int, *, shard: Shard = (0, 1)) -> Batches:
        """Training batches; `batch_size` counts the images of all shards together.

        Raises:
            ConfigError: a batch size below 1, or a shard that would get no image in some batch.
        """
        ...

    def evaluation(self, split: str, batch_size: int, *, shard: Shard = (0, 1)) -> Loader:
        """The images of `train`, `val` or `test` in order, without augmentation.

        Raises:
            ConfigError: the dataset has no such split.
        """
        ...

    def calibration(self, n: int, batch_size: int, *, shard: Shard = (0, 1)) -> Loader:
        """`n` fixed training images (or all there are), classes as equal as possible, not augmented.

        Args:
            shard: batches are dealt out whole, so that all shards together have the very batches of one.
        """
        ...

    def limit(self, batches: int | None) -> Dataset:
        """A copy in which every pass over images ends after `batches` batches; None: no limit."""
        ...
