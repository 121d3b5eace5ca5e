"""MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et al., arXiv:1708.07747) from the IDX files that their authors publish.

An IDX file is a magic number that says type and dimensions, the sizes as big-endian integers, then the bytes. Both sets have
the same four files, compressed by gzip or not.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from prune_cli.data.arrays import Data, Split, from_arrays
from prune_cli.data.augment import Augment
from prune_cli.data.fake import stand_in
from prune_cli.data.normalization import Normalize, statistics
from prune_cli.data.splits import Amount
from prune_cli.errors import DataError, first_line
from prune_cli.reading import opened

_SIDE = 28
_UBYTE = 0x08  # type of the numbers, third byte of the magic number
_CHUNK = 1 << 20
_FILES = {  # split -> its images and labels
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class Published:
    """Where a set's files are and what they hold.

    Attributes:
        folders: below the root, where they may lie, compressed or not; a download goes into the first.
        url: of the folder that has the compressed files.
        md5: of the compressed files, by name without `.gz`.
        images: of each split.
    """

    name: str
    classes: Sequence[str]
    folders: Sequence[str]
    url: str
    md5: Mapping[str, str]
    images: Mapping[str, int]


MNIST = Published(
    name="mnist",
    classes=tuple("0123456789"),
    folders=("mnist", "MNIST/raw", "."),
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    md5={
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    images={"train": 60_000, "test": 10_000},
)

FASHION_MNIST = Published(
    name="fashion_mnist",
    classes=("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    folders=("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "."),
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    md5={
        "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    images={"train": 60_000, "test": 10_000},
)


def mnist(
    root: str = "data",
    *,
    download: bool = False,
    val: Amount = 5000,
    split_seed: int = 0,
    crop_padding: int = 0,
    flip: bool = False,
    padding: Literal["zeros", "reflect"] = "zeros",
    normalize: Normalize = "mnist",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fake: bool = False,
) -> Data:
    """MNIST: 60,000 training and 10,000 test images of 1 x 28 x 28, ten handwritten digits.

    Args:
        root: folder that holds the four IDX files, plain or compressed, itself or in `mnist` or `MNIST/raw`.
        download: fetch the files (12 MB) into `root/mnist` if they are in none of these.
        val: fraction in [0, 1) of the training images that is held out, or from 1 on their number.
        split_seed: of the held-out choice.
        crop_padding, flip, padding: augmentation, see `Augment`.
        normalize, mean, std: see `normalization.statistics`.
        fake: made-up images of the same shape and classes; `root` is not read.

    Raises:
        DataError: files that are missing or damaged, or a download that failed.
        ConfigError: a value out of range.
    """
    augment, normalisation = Augment(crop_padding, flip, padding), statistics(normalize, mean, std, 1)
    return _made(MNIST, root, download, val, split_seed, augment, normalisation, fake)


def fashion_mnist(
    root: str = "data",
    *,
    download: bool = False,
    val: Amount = 5000,
    split_seed: int = 0,
    crop_padding: int = 0,
    flip: bool = False,
    padding: Literal["zeros", "reflect"] = "zeros",
    normalize: Normalize = "fashion_mnist",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fake: bool = False,
) -> Data:
    """Fashion-MNIST: 60,000 training and 10,000 test images of 1 x 28 x 28, ten kinds of clothes.

    Args:
        root: folder that holds the four IDX files, plain or compressed, itself or in `fashion_mnist`,
            `FashionMNIST/raw`, or `fashion-mnist` (Debian's package: root=/usr/share/datasets).
        download: fetch the files (31 MB) into `root/fashion_mnist` if they are in none of these.
        val: fraction in [0, 1) of the training images that is held out, or from 1 on their number.
        split_seed: of the held-out choice.
        crop_padding, flip, padding: augmentation, see `Augment`.
        normalize, mean, std: see `normalization.statistics`.
        fake: made-up images of the same shape and classes; `root` is not read.

    Raises:
        DataError: files that are missing or damaged, or a download that failed.
        ConfigError: a value out of range.
    """
    augment, normalisation = Augment(crop_padding, flip, padding), statistics(normalize, mean, std, 1)
    return _made(FASHION_MNIST, root, download, val, split_seed, augment, normalisation, fake)


def _made(
    published: Published,
    root: str,
    download: bool,
    val: Amount,
    split_seed: int,
    augment: Augment,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    fake: bool,
) -> Data:
    if fake:
        return stand_in(
            published.name,
            (1, _SIDE, _SIDE),
            published.classes,
            normalisation,
            augment,
            val=val,
            split_seed=split_seed,
            published=(published.images["train"], published.images["test"]),
        )
    splits = load(published, Path(root).expanduser(), download)
    return from_arrays(
        published.name,
        splits["train"],
        splits["test"],
        classes=published.classes,
        mean=normalisation[0],
        std=normalisation[1],
        val=val,
        split_seed=split_seed,
        augment=augment,
    )


def load(published: Published, root: Path, download: bool) -> dict[str, Split]:
    """The train and test splits from the files under `root`.

    Raises:
        DataError: they are not there (and no download was asked for), or one is missing or damaged.
    """
    first = _FILES["train"][0]
    there = [root / folder for folder in published.folders if _found(root / folder, first).exists()]
    if not there:
        if not download:
            raise DataError(
                f"{published.name} is not in {root.absolute()}: put {first}.gz and the other three files there or in "
                f"{published.folders[0]} (from {published.url}), or set dataset.download=true"
            )
        fetch(published, root)
        there = [root / published.folders[0]]
    return {split: _split(published, there[0], split) for split in _FILES}


def _found(folder: Path, name: str) -> Path:
    """A file of the set, plain if it is there."""
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"


def _split(published: Published, folder: Path, split: str) -> Split:
    count = published.images[split]
    images, labels = (_found(folder, name) for name in _FILES[split])
    pixels = read_idx(images, (count, _SIDE, _SIDE))
    classes = read_idx(labels, (count,))
    if classes.max() >= len(published.classes):
        raise DataError(f"{labels} has a label outside [0, {len(published.classes)}): fetch it again")
    return Split(torch.from_numpy(pixels[:, None]), torch.from_numpy(classes.astype(np.int64)))


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes in an IDX file, of which exactly the expected ones are read; compressed where its name ends in `.gz`.

    Raises:
        DataError: the file is missing, damaged, or holds something else, in one line.
    """
    header = struct.pack(f">HBB{len(shape)}I", 0, _UBYTE, len(shape), *shape)
    wanted = len(header) + int(np.prod(shape))
    try:
        with opened(path, DataError) as stream:
            file = gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream
            content = bytearray()
            while len(content) <= wanted and (part := file.read(min(_CHUNK, wanted + 1 - len(content)))):
                content += part
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({first_line(error)}): fetch it again") from error
    if content[: len(header)] != header:
        raise DataError(f"{path} is no IDX file of {' x '.join(map(str, shape))} bytes: fetch it again")
    if len(content) != wanted:
        found = "more" if len(content) > wanted else str(len(content))
        raise DataError(f"{path} holds {found} bytes instead of {wanted}: fetch it again")
    return np.frombuffer(bytes(content), dtype=np.uint8, offset=len(header)).reshape(shape).copy()


def fetch(published: Published, root: Path) -> None:
    """Downloads the compressed files, checked against their published MD5s.

    Raises:
        DataError: no network, a damaged file, or a folder that cannot be written.
    """
    from torchvision.datasets.utils import download_url  # torchvision takes seconds to import

    folder = root / published.folders[0]
    try:
        for name, md5 in published.md5.items():
            download_url(f"{published.url}{name}.gz", folder, md5=md5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"downloading {published.name} from {published.url} into {folder.absolute()} failed ({first_line(error)}): "
            "fetch its four files elsewhere and put them there"
        ) from error
