"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from the files their author publishes.

The binary version is read as it is. The Python version is a pickle: its files are read only if their MD5 is that of the
published ones, and even then by an unpickler that can build nothing but lists, dicts, strings and arrays.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from prune_cli.data.arrays import Data, Split, from_arrays
from prune_cli.data.augment import Augment
from prune_cli.data.cifar_pickle import read_batch
from prune_cli.data.fake import stand_in
from prune_cli.data.normalization import Normalize, statistics
from prune_cli.data.splits import Amount
from prune_cli.errors import DataError, first_line

_PIXELS = 3 * 32 * 32
_URL = "https://www.cs.toronto.edu/~kriz/"

_CIFAR10_CLASSES = """
airplane automobile bird cat deer dog frog horse ship truck
"""
_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class Layout:
    """Where the published files are and what they hold.

    Attributes:
        binary_folder, python_folder: as the archives unpack.
        archive, archive_md5: of the binary version.
        label_bytes: in front of each image of the binary version; the last one is the (fine) label.
        label_key: of the labels in the Python version.
        binary_files, python_files: file name to images (binary) or to MD5 (Python); the last file is the
            test set.
    """

    name: str
    classes: Sequence[str]
    binary_folder: str
    python_folder: str
    archive: str
    archive_md5: str
    label_bytes: int
    label_key: bytes
    binary_files: Mapping[str, int]
    python_files: Mapping[str, str]


CIFAR10 = Layout(
    name="cifar10",
    classes=tuple(_CIFAR10_CLASSES.split()),
    binary_folder="cifar-10-batches-bin",
    python_folder="cifar-10-batches-py",
    archive="cifar-10-binary.tar.gz",
    archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
    label_bytes=1,
    label_key=b"labels",
    binary_files={f"data_batch_{part}.bin": 10_000 for part in range(1, 6)} | {"test_batch.bin": 10_000},
    python_files={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)

CIFAR100 = Layout(
    name="cifar100",
    classes=tuple(_CIFAR100_CLASSES.split()),
    binary_folder="cifar-100-binary",
    python_folder="cifar-100-python",
    archive="cifar-100-binary.tar.gz",
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
    label_bytes=2,
    label_key=b"fine_labels",
    binary_files={"train.bin": 50_000, "test.bin": 10_000},
    python_files={
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
)


def cifar10(
    root: str = "data",
    *,
    download: bool = False,
    val: Amount = 5000,
    split_seed: int = 0,
    crop_padding: int = 4,
    flip: bool = True,
    padding: Literal["zeros", "reflect"] = "zeros",
    normalize: Normalize = "cifar10",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fake: bool = False,
) -> Data:
    """CIFAR-10: 50,000 training and 10,000 test images of 3 x 32 x 32, ten classes.

    Args:
        root: folder that holds `cifar-10-batches-bin` or `cifar-10-batches-py`.
        download: fetch the binary version into `root` if neither is there.
        val: fraction in [0, 1) of the training images that is held out, or from 1 on their number.
        split_seed: of the held-out choice.
        crop_padding, flip, padding: augmentation, see `Augment`.
        normalize, mean, std: see `normalization.statistics`.
        fake: made-up images of the same shape and classes; `root` is not read.

    Raises:
        DataError: files that are missing or damaged, or a download that failed.
        ConfigError: a value out of range.
    """
    augment, normalisation = Augment(crop_padding, flip, padding), statistics(normalize, mean, std, 3)
    return _cifar(CIFAR10, root, download, val, split_seed, augment, normalisation, fake)


def cifar100(
    root: str = "data",
    *,
    download: bool = False,
    val: Amount = 5000,
    split_seed: int = 0,
    crop_padding: int = 4,
    flip: bool = True,
    padding: Literal["zeros", "reflect"] = "zeros",
    normalize: Normalize = "cifar100",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fake: bool = False,
) -> Data:
    """CIFAR-100: 50,000 training and 10,000 test images of 3 x 32 x 32, a hundred (fine) classes.

    Args:
        root: folder that holds `cifar-100-binary` or `cifar-100-python`.
        download: fetch the binary version into `root` if neither is there.
        val: fraction in [0, 1) of the training images that is held out, or from 1 on their number.
        split_seed: of the held-out choice.
        crop_padding, flip, padding: augmentation, see `Augment`.
        normalize, mean, std: see `normalization.statistics`.
        fake: made-up images of the same shape and classes; `root` is not read.

    Raises:
        DataError: files that are missing or damaged, or a download that failed.
        ConfigError: a value out of range.
    """
    augment, normalisation = Augment(crop_padding, flip, padding), statistics(normalize, mean, std, 3)
    return _cifar(CIFAR100, root, download, val, split_seed, augment, normalisation, fake)


def _cifar(
    layout: Layout,
    root: str,
    download: bool,
    val: Amount,
    split_seed: int,
    augment: Augment,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    fake: bool,
) -> Data:
    if fake:
        shape = (3, 32, 32)
        *train_files, test_images = layout.binary_files.values()
        return stand_in(
            layout.name,
            shape,
            layout.classes,
            normalisation,
            augment,
            val=val,
            split_seed=split_seed,
            published=(sum(train_files), test_images),
        )
    train, test = load(layout, Path(root).expanduser(), download)
    return from_arrays(
        layout.name,
        train,
        test,
        classes=layout.classes,
        mean=normalisation[0],
        std=normalisation[1],
        val=val,
        split_seed=split_seed,
        augment=augment,
    )


def load(layout: Layout, root: Path, download: bool) -> tuple[Split, Split]:
    """The train and test splits from the binary or else the Python version under `root`.

    Raises:
        DataError: neither is there (and no download was asked for), or a file is damaged.
    """
    binary, python = root / layout.binary_folder, root / layout.python_folder
    if not binary.is_dir() and not python.is_dir():
        if not download:
            raise DataError(
                f"{layout.name} is not in {root.absolute()}: put the folder {layout.binary_folder} or "
                f"{layout.python_folder} there (from {_URL}cifar.html), or set dataset.download=true"
            )
        fetch(layout, root)
    if binary.is_dir():
        parts = [
            read_binary(binary / name, count, layout.label_bytes, len(layout.classes))
            for name, count in layout.binary_files.items()
        ]
    else:
        parts = [
            _read_python(python / name, md5, layout.label_key, len(layout.classes))
            for name, md5 in layout.python_files.items()
        ]
    *train, test = parts
    return Split(torch.cat([p.images for p in train]), torch.cat([p.labels for p in train])), test


def read_binary(path: Path, count: int, label_bytes: int, num_classes: int) -> Split:
    """One file of the binary version: `count` records of `label_bytes` labels and 3 x 1,024 pixels.

    Raises:
        DataError: the file is missing, has another size or a label out of range.
    """
    raw = np.frombuffer(_read(path), dtype=np.uint8)
    expected = count * (label_bytes + _PIXELS)
    if len(raw) != expected:
        raise DataError(f"{path} has {len(raw)} bytes instead of {expected}: unpack or download it again")
    records = raw.reshape(count, label_bytes + _PIXELS)
    return _split(records[:, label_bytes:], records[:, label_bytes - 1], num_classes, path)


def _read_python(path: Path, md5: str, label_key: bytes, num_classes: int) -> Split:
    raw = _read(path)
    found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{path} is not the published file (MD5 {found}, not {md5}): unpack or download it again")
    pixels, labels = read_batch(raw, label_key, path)
    return _split(pixels, labels, num_classes, path)


def _split(pixels: np.ndarray, labels: np.ndarray, num_classes: int, path: Path) -> Split:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(f"{path} has a label outside [0, {num_classes}): unpack or download it again")
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return Split(images, torch.from_numpy(labels.astype(np.int64)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): unpack or download the dataset again") from None


def fetch(layout: Layout, root: Path) -> None:
    """Downloads the binary version into `root` (checked against its published MD5) and unpacks it.

    The folder appears whole or not at all.

    Raises:
        DataError: no network, a damaged archive, or a folder that cannot be written.
    """
    from torchvision.datasets.utils import download_url  # torchvision takes seconds to import

    try:
        download_url(_URL + layout.archive, root, md5=layout.archive_md5)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            with tarfile.open(root / layout.archive) as tar:
                tar.extractall(scratch, filter="data")
            os.replace(Path(scratch) / layout.binary_folder, root / layout.binary_folder)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        reason = first_line(error)
        raise DataError(
            f"downloading {_URL}{layout.archive} into {root.absolute()} failed ({reason}): "
            f"fetch it elsewhere and put the folder {layout.binary_folder} there"
        ) from error
