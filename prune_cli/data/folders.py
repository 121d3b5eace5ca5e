"""Any folder of class folders as a dataset: in memory where it fits, else decoded by workers."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from prune_cli.data.arrays import Data, Split, check_memory, from_arrays
from prune_cli.data.augment import Augment
from prune_cli.data.dataset import SPLITS
from prune_cli.data.fake import stand_in
from prune_cli.data.files import Files, decode, decode_cached, read_image, same_classes, scan
from prune_cli.data.lazy import Crops, LazyData
from prune_cli.data.normalization import Normalize, statistics
from prune_cli.data.splits import Amount, held_out_count, hold_out
from prune_cli.errors import ConfigError, DataError

_log = logging.getLogger(__name__)


def image_folder(
    root: str | None = None,
    *,
    image_size: int | None = None,
    channels: Literal[1, 3] = 3,
    test: Amount = 0.2,
    val: Amount | None = None,
    split_seed: int = 0,
    crop_padding: int = 4,
    flip: bool = True,
    padding: Literal["zeros", "reflect"] = "zeros",
    crop_scale: Sequence[float] = (0.08, 1.0),
    normalize: Normalize = "imagenet",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_in_memory: int = 2 * 1024**3,
    workers: int = 2,
    cache: str | None = None,
    fake: bool = False,
) -> Data | LazyData:
    """A dataset from ROOT/{train,val,test}/CLASS/* or ROOT/CLASS/*.

    Without a test folder, a val folder is the test split; without either, test images are held out of all.
    Datasets that fit in `max_in_memory` are decoded once and augmented by shifts (`crop_padding`); larger
    ones are decoded by workers and augmented by random resized crops (`crop_scale`).
    Evaluation is the same for both.

    Args:
        root: the folder.
        image_size: pixels of a side: the shorter side is resized to it and the middle cut out. None: as
            they are.
        channels: 1 converts to grey, 3 to RGB.
        test: fraction in [0, 1) or number of images held out for testing where there is no test folder.
        val: fraction in [0, 1) or number of training images held out for validation. None: the val folder, if
            there is one besides a test folder, else none.
        split_seed: of the held-out choices.
        crop_padding, flip, padding: augmentation in memory, see `Augment`.
        crop_scale: least and largest share of the area of a random crop, for datasets not held in memory.
        normalize, mean, std: see `normalization.statistics`.
        max_in_memory: bytes of decoded pixels up to which all is held in memory.
        workers: processes that decode; 0: none besides this one.
        cache: folder in which decoded pixels are kept for the next run; None: nothing is kept.
        fake: made-up images, ten classes; `root` is not read.

    Raises:
        DataError: a folder without images, with one class or with differing classes, or an image that is
        damaged. ConfigError: a value out of range.
    """
    normalisation = statistics(normalize, mean, std, channels)
    augment = Augment(crop_padding, flip, padding)
    if fake:
        classes = [f"class {index}" for index in range(10)]
        made_up = (channels, image_size or 32, image_size or 32)
        return stand_in("image_folder", made_up, classes, normalisation, augment, val=val or 0, split_seed=split_seed)
    splits = find_splits(root, test, val, split_seed)
    shape = _shape(splits["train"], image_size, channels)
    total = sum(len(files) for files in splits.values())
    if total * shape[0] * shape[1] * shape[2] > max_in_memory:
        if image_size is None:
            raise ConfigError(
                f"{root}: {total} images are more than dataset.max_in_memory={max_in_memory} bytes; "
                "set dataset.image_size to decode them batch by batch"
            )
        crops = Crops(image_size, image_size, crop_range(crop_scale), flip)
        return lazy_data("image_folder", splits, channels, normalisation, crops, workers, split_seed)
    check_workers(workers)
    check_memory(str(root), total, shape)
    images = {
        name: decode(files, image_size, channels, shape, workers)
        if cache is None
        else decode_cached(files, image_size, channels, shape, workers, Path(cache).expanduser())
        for name, files in splits.items()
    }
    return _in_memory(splits, images, normalisation, augment, split_seed)


def _in_memory(
    splits: Mapping[str, Files],
    images: Mapping[str, torch.Tensor],
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    augment: Augment,
    split_seed: int,
) -> Data:
    arrays = {name: Split(images[name], torch.from_numpy(files.labels)) for name, files in splits.items()}
    return from_arrays(
        "image_folder",
        arrays["train"],
        arrays["test"],
        classes=splits["train"].classes,
        mean=normalisation[0],
        std=normalisation[1],
        val=arrays.get("val", 0),
        split_seed=split_seed,
        augment=augment,
    )


def find_splits(place: str | None, test: Amount, val: Amount | None, split_seed: int) -> dict[str, Files]:
    """The files of the train, perhaps val, and test splits under a folder; see `image_folder`.

    Raises:
        DataError: a folder that is missing, or whose content makes no dataset.
        ConfigError: `test` or `val` out of range, or `val` beside a val folder.
    """
    if not place:
        raise DataError("image_folder needs dataset.root=FOLDER with FOLDER/{train,test}/CLASS/* or FOLDER/CLASS/*")
    root = Path(place).expanduser()
    if not root.is_dir():
        raise DataError(f"there is no folder {root.absolute()}: dataset.root must hold train/CLASS/* or CLASS/*")
    folders = {name: root / name for name in SPLITS if (root / name).is_dir()}
    if folders and "train" not in folders:
        raise DataError(f"{root} has {' and '.join(folders)} but no train folder")
    train = scan(folders.get("train", root))
    if "test" in folders:
        held = {name: scan(folders[name]) for name in folders if name != "train"}
    elif "val" in folders:
        _log.info("%s has no test folder: its val folder is the test split", root)
        held = {"test": scan(folders["val"])}
    else:
        count = held_out_count(test, len(train), "dataset.test")
        if not count:
            raise ConfigError(f"dataset.test={test} leaves no test images, and {root} has no test folder")
        kept, chosen = hold_out(train.labels, count, "test", split_seed)
        held = {"test": train.take(chosen)}
        train = train.take(kept)
        _log.warning("%s has no test folder: %d of its images are held out by split_seed", root, count)
    for files in held.values():
        same_classes(train, files)
    if "val" in held and val is not None:
        if val:
            raise ConfigError(f"{root} has a val folder: leave dataset.val=null to use it (or 0 to leave it out)")
        del held["val"]
    if val:
        kept, chosen = hold_out(train.labels, held_out_count(val, len(train), "dataset.val"), split_seed)
        if len(chosen):
            held["val"] = train.take(chosen)
            train = train.take(kept)
    found = {"train": train} | held
    return {name: found[name] for name in SPLITS if name in found}


def lazy_data(
    name: str,
    splits: Mapping[str, Files],
    channels: int,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    crops: Crops,
    workers: int,
    split_seed: int,
) -> LazyData:
    """A dataset of files; its fingerprint covers names, sizes and splits, not where they lie."""
    crops.check()
    check_workers(workers)
    content = [(split, files.digest()) for split, files in splits.items()]
    return LazyData(
        name=name,
        classes=splits["train"].classes,
        channels=channels,
        mean=normalisation[0],
        std=normalisation[1],
        fingerprint=hashlib.sha256(repr(content).encode()).hexdigest(),
        splits={split: replace(files, folder=files.folder.absolute()) for split, files in splits.items()},
        crops=crops,
        workers=workers,
        split_seed=split_seed,
    )


def _shape(files: Files, image_size: int | None, channels: int) -> tuple[int, int, int]:
    if image_size is not None:
        if image_size < 1:
            raise ConfigError(f"dataset.image_size={image_size}: must be at least 1 pixel")
        return channels, image_size, image_size
    first = read_image(files.folder / files.paths[0], channels)
    return channels, first.height, first.width


def crop_range(crop_scale: Sequence[float]) -> tuple[float, float]:
    """The two ends of a crop's share of the area; raises ConfigError unless there are two."""
    if len(crop_scale) != 2:
        raise ConfigError(f"dataset.crop_scale={list(crop_scale)}: give [least, largest]")
    return crop_scale[0], crop_scale[1]


def check_workers(workers: int) -> None:
    """Raises ConfigError for a negative number of processes."""
    if workers < 0:
        raise ConfigError(f"dataset.workers={workers}: must be 0 or more processes")
