"""Made-up images that a network can learn, of any shape and number of classes: for tests and timings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from prune_cli.data.arrays import Data, Split, check_memory, from_arrays
from prune_cli.data.augment import Augment
from prune_cli.data.normalization import Normalize, statistics
from prune_cli.data.splits import Amount, generator, held_out_count
from prune_cli.errors import ConfigError

MOST_CLASSES = 100_000

_GRID = 4  # cells along each side of a class's pattern


def fake(
    shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    *,
    train: int = 512,
    test: int = 256,
    seed: int = 0,
    val: Amount = 0.1,
    split_seed: int = 0,
    crop_padding: int = 4,
    flip: bool = False,
    padding: Literal["zeros", "reflect"] = "zeros",
    normalize: Normalize = "half",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fake: bool = True,
) -> Data:
    """Images with a coarse pattern per class under uniform noise.

    Args:
        shape: channels, height, width of an image.
        num_classes: at least 2; labels go round them.
        train, test: number of images.
        seed: of the patterns and the noise.
        val: fraction in [0, 1) of the training images that is held out, or from 1 on their number.
        split_seed: of the held-out choice.
        crop_padding, flip, padding: augmentation, see `Augment`.
        normalize, mean, std: see `normalization.statistics`.
        fake: present in every dataset; this one is always made up.

    Raises:
        ConfigError: a shape, size or number of classes that makes no dataset.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"dataset.shape={list(shape)}: give [channels, height, width]")
    if num_classes > MOST_CLASSES:
        raise ConfigError(f"dataset.num_classes={num_classes}: made-up images have at most {MOST_CLASSES} classes")
    return stand_in(
        "fake",
        (shape[0], shape[1], shape[2]),
        [f"class {index}" for index in range(num_classes)],
        statistics(normalize, mean, std, shape[0]),
        Augment(crop_padding, flip, padding),
        val=val,
        split_seed=split_seed,
        sizes=(train, test),
        seed=seed,
    )


def stand_in(
    name: str,
    shape: tuple[int, int, int],
    classes: Sequence[str],
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    augment: Augment,
    *,
    val: Amount,
    split_seed: int,
    sizes: tuple[int, int] = (512, 256),
    seed: int = 0,
    published: tuple[int, int] | None = None,
) -> Data:
    """A made-up dataset with the name, shape and classes of a real one; `sizes` counts train and test images.

    A number of held-out images that was meant for the real dataset becomes a tenth of these.

    Args:
        published: train and test images of the real one.

    Raises:
        ConfigError: sizes that make no dataset, or that no memory holds.
    """
    if len(classes) < 2 or min(sizes) < 1:
        raise ConfigError(f"{name}: need at least 2 classes and 1 image per split; got {len(classes)} and {sizes}")
    check_memory(name, sum(sizes), shape)
    patterns = generator("patterns", seed).integers(0, 128, (len(classes), shape[0], _GRID, _GRID), dtype=np.uint8)
    splits = [_split(patterns, shape, count, generator("noise", seed, split)) for split, count in enumerate(sizes)]
    made = from_arrays(
        name,
        splits[0],
        splits[1],
        classes=classes,
        mean=normalisation[0],
        std=normalisation[1],
        val=0.1 if val >= sizes[0] else val,
        split_seed=split_seed,
        augment=augment,
    )
    if published is None:
        return made
    held = held_out_count(val, published[0], "dataset.val")
    counts = {"train": published[0] - held, "val": held, "test": published[1]}
    return replace(made, published={split: count for split, count in counts.items() if count})


def _split(patterns: np.ndarray, shape: tuple[int, int, int], count: int, rng: np.random.Generator) -> Split:
    labels = np.arange(count) % len(patterns)
    rows = np.arange(shape[1]) * _GRID // shape[1]
    columns = np.arange(shape[2]) * _GRID // shape[2]
    images = rng.integers(0, 128, (count, *shape), dtype=np.uint8)
    for index, label in enumerate(labels):
        images[index] += patterns[label][:, rows[:, None], columns]
    return Split(torch.from_numpy(images), torch.from_numpy(labels))
