"""ImageNet (ILSVRC 2012) from its unpacked folders, decoded by workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prune_cli.data.arrays import Data
from prune_cli.data.augment import Augment
from prune_cli.data.fake import stand_in
from prune_cli.data.files import same_classes, scan
from prune_cli.data.folders import crop_range, lazy_data
from prune_cli.data.lazy import Crops, LazyData
from prune_cli.data.normalization import Normalize, statistics
from prune_cli.data.splits import Amount, held_out_count, hold_out
from prune_cli.errors import DataError

PUBLISHED = (1_281_167, 50_000)  # training and validation images of ILSVRC 2012


def imagenet(
    root: str = "data/imagenet",
    *,
    image_size: int = 224,
    resize: int = 256,
    val: Amount = 0,
    split_seed: int = 0,
    crop_scale: Sequence[float] = (0.08, 1.0),
    flip: bool = True,
    normalize: Normalize = "imagenet",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    workers: int = 8,
    fake: bool = False,
) -> Data | LazyData:
    """ImageNet, or some of its classes: ROOT/train/CLASS/* to train on, ROOT/val/CLASS/* to test.

    Args:
        root: the folder with `train` and `val`.
        image_size: pixels of a side of every image a network sees.
        resize: pixels of the shorter side of a test image before its middle is cut out.
        val: fraction in [0, 1) of the training images that is held out, or from 1 on their number.
        split_seed: of the held-out choice.
        crop_scale: least and largest share of the area of a random training crop.
        flip: mirror training images, with probability 1/2.
        normalize, mean, std: see `normalization.statistics`.
        workers: processes that decode; 0: none besides this one.
        fake: 256 made-up images and 1,000 classes; `root` is not read.

    Raises:
        DataError: folders that are missing or differ in their classes, or an image that is damaged.
        ConfigError: a value out of range.
    """
    normalisation = statistics(normalize, mean, std, 3)
    crops = Crops(image_size, resize, crop_range(crop_scale), flip)
    crops.check()
    if fake:
        classes = [f"class {index}" for index in range(1000)]
        shape, augment = (3, image_size, image_size), Augment(flip=flip)
        return stand_in(
            "imagenet",
            shape,
            classes,
            normalisation,
            augment,
            val=val,
            split_seed=split_seed,
            sizes=(256, 128),
            published=PUBLISHED,
        )
    folder = Path(root).expanduser()
    if not (folder / "train").is_dir() or not (folder / "val").is_dir():
        raise DataError(
            f"imagenet is not in {folder.absolute()}: put train/CLASS/*.JPEG and val/CLASS/*.JPEG there "
            "(ILSVRC 2012, from image-net.org, which asks for a registration)"
        )
    train, test = scan(folder / "train"), scan(folder / "val")
    same_classes(train, test)
    kept, held = hold_out(train.labels, held_out_count(val, len(train), "dataset.val"), split_seed)
    splits = {"train": train, "test": test}
    if len(held):
        splits = {"train": train.take(kept), "val": train.take(held), "test": test}
    return lazy_data("imagenet", splits, 3, normalisation, crops, workers, split_seed)
