"""Handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from prune_cli.data.arrays import Data, Split, check_memory, from_arrays
from prune_cli.data.augment import Augment
from prune_cli.data.fake import stand_in
from prune_cli.data.normalization import Normalize, statistics
from prune_cli.data.splits import Amount, hold_out
from prune_cli.errors import ConfigError

_IMAGES = 1797
_TEST_IMAGES = 360  # of 1,797, stratified; always the same ones
_SIZE = 8


def digits(
    *,
    image_size: int | None = None,
    interpolation: Literal["bilinear", "nearest"] = "bilinear",
    channels: Literal[1, 3] = 1,
    val: Amount = 0.1,
    split_seed: int = 0,
    crop_padding: int = 0,
    flip: bool = False,
    padding: Literal["zeros", "reflect"] = "zeros",
    normalize: Normalize = "digits",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fake: bool = False,
) -> Data:
    """1,437 training and 360 test images of ten digits, 8 x 8 pixels of 17 grey levels.

    The optical recognition of handwritten digits test set of the UCI repository (Alpaydin and Kaynak,
    1998), as `sklearn.datasets.load_digits` ships it.

    Args:
        image_size: pixels of a side to resize to; None: 8.
        interpolation: how images are resized.
        channels: 3 repeats the grey value.
        val: fraction in [0, 1) of the training images that is held out, or from 1 on their number.
        split_seed: of the held-out choice; the test images never change.
        crop_padding, flip, padding: augmentation, see `Augment`.
        normalize, mean, std: see `normalization.statistics`.
        fake: made-up images of the same shape and classes.

    Raises:
        ConfigError: a value out of range.
    """
    size = _SIZE if image_size is None else image_size
    if size < 1:
        raise ConfigError(f"dataset.image_size={image_size}: must be at least 1 pixel")
    classes = [str(digit) for digit in range(10)]
    normalisation = statistics(normalize, mean, std, channels)
    augment = Augment(crop_padding, flip, padding)
    if fake:
        shape = (channels, size, size)
        known = (_IMAGES - _TEST_IMAGES, _TEST_IMAGES)
        return stand_in(
            "digits", shape, classes, normalisation, augment, val=val, split_seed=split_seed, published=known
        )
    check_memory("digits", _IMAGES, (channels, size, size), value_bytes=8)
    train, test = _load(size, interpolation, channels)
    return from_arrays(
        "digits",
        train,
        test,
        classes=classes,
        mean=normalisation[0],
        std=normalisation[1],
        val=val,
        split_seed=split_seed,
        augment=augment,
    )


def _table() -> np.ndarray:
    """The file that `sklearn.datasets.load_digits` reads, without importing scikit-learn, which takes seconds.

    Returns:
        A row per image: its pixels in 0..16, then its label.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations, "a dependency"
    with gzip.open(Path(package.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", "rt") as file:
        return np.loadtxt(file, delimiter=",")


def _load(size: int, interpolation: str, channels: int) -> tuple[Split, Split]:
    table = _table()
    labels = table[:, -1].astype(np.int64)
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, _SIZE, _SIZE) * (255 / 16))  # 0..16 to 0..255
    if size != _SIZE:
        corners = None if interpolation == "nearest" else False
        images = F.interpolate(images, size=(size, size), mode=interpolation, align_corners=corners)
    pixels = images.round().to(torch.uint8).expand(-1, channels, -1, -1).contiguous()
    whole = Split(pixels, torch.from_numpy(labels))
    kept, held = hold_out(labels, _TEST_IMAGES, "digits test")
    return whole.take(kept), whole.take(held)
