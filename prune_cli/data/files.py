"""Folders of class folders: which images there are, and how one becomes pixels.

Damaged files, empty folders and classes that differ between splits are found here and named in one line.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prune_cli.errors import DataError, first_line
from prune_cli.progress import track

_log = logging.getLogger(__name__)

_EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"))
_CHUNK = 500  # images that one decoding task takes
_WORTH_WORKERS = 4000  # images from which starting processes pays


@dataclass(frozen=True, eq=False)
class Files:
    """The image files of one split.

    Attributes:
        folder: what the paths are relative to.
        paths: sorted, by class and name.
        labels: int64 `(N,)`, the place of the class in `classes`.
        classes: the names of the class folders, sorted.
        stamps: int64 `(N, 2)`, size in bytes and time of the last change in ns.
    """

    folder: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    stamps: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> Files:
        paths = tuple(self.paths[index] for index in indices)
        return Files(self.folder, paths, self.labels[indices], self.classes, self.stamps[indices])

    def digest(self, *, times: bool = False) -> str:
        """sha256 (hex) of names, labels and sizes, and with `times` of the times of the last change."""
        digest = hashlib.sha256("\n".join((*self.classes, "", *self.paths)).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.labels).data)
        digest.update(np.ascontiguousarray(self.stamps if times else self.stamps[:, 0]).data)
        return digest.hexdigest()


def scan(folder: Path) -> Files:
    """The images in `folder`/CLASS/**, with hidden files and other kinds of file left out; links are followed.

    Raises:
        DataError: `folder` cannot be read, has fewer than two classes, or a class without an image; a link to a folder
            that it is in; a pipe, socket or device with the name of an image.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        images = [sorted(_images(folder, name, (_identity(folder),))) for name in names]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
    paths: list[str] = []
    labels: list[int] = []
    stamps: list[tuple[int, int]] = []
    for label, (name, found) in enumerate(zip(names, images, strict=True)):
        if not found:
            raise DataError(f"{folder / name} holds no images; every folder in {folder} is taken for a class")
        paths += [path for path, _ in found]
        stamps += [stamp for _, stamp in found]
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"{folder} has no images: put them in one folder per class, {folder}/CLASS/*.jpg")
    if len(names) == 1:
        raise DataError(f"{folder} has one class, {names[0]!r}: classification needs at least two class folders")
    return Files(folder, tuple(paths), np.array(labels, np.int64), tuple(names), np.array(stamps, np.int64))


def _identity(folder: Path) -> tuple[int, int]:
    """What two paths to one folder share."""
    found = folder.stat()
    return found.st_dev, found.st_ino


def _images(folder: Path, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The images in a folder and those in it; `above`: the folders that it is in."""
    own = _identity(folder / below)
    if own in above:
        raise DataError(f"{folder / below} is a link to a folder that it is in itself: remove it")
    with os.scandir(folder / below) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}"
            if entry.name.startswith("."):
                continue
            named_image = os.path.splitext(entry.name)[1].lower() in _EXTENSIONS
            if entry.is_dir():
                if named_image:
                    _log.warning("%s is a folder; the images in it are taken", folder / path)
                yield from _images(folder, path, (*above, own))
            elif named_image:
                found = entry.stat()
                if not stat.S_ISREG(found.st_mode):
                    raise DataError(f"{folder / path} is a pipe, a socket or a device, not an image: remove it")
                yield path, (found.st_size, found.st_mtime_ns)


def same_classes(train: Files, other: Files) -> None:
    """Raises DataError unless both have the same class folders."""
    if train.classes != other.classes:
        missing = sorted(set(train.classes) - set(other.classes))
        extra = sorted(set(other.classes) - set(train.classes))
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r} besides"
        raise DataError(f"{other.folder} {what}: it must have the same class folders as {train.folder}")


def read_image(path: Path, channels: int) -> Image.Image:
    """An image file, converted to grey (1 channel) or RGB (3), fully decoded.

    Raises:
        DataError: naming the file, if it is not a whole image.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # odd metadata; the pixels are what counts
            if image.mode.startswith("I;16"):  # Pillow would cut off at 255 what is above
                high = np.asarray(image.convert("I")) // 257
                return Image.fromarray(high.astype(np.uint8)).convert("L" if channels == 1 else "RGB")
            return image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = first_line(error).replace(f" {str(path)!r}", "")
        raise DataError(f"cannot read the image {path}: {reason}; replace or remove it") from None


def centre(image: Image.Image, resize: int, size: int) -> Image.Image:
    """Resizes the shorter side to `resize` pixels (bilinear) and cuts `size` x `size` from the middle."""
    width, height = image.size
    if min(width, height) != resize:
        short = min(width, height)
        width, height = width * resize // short, height * resize // short
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if (width, height) == (size, size):
        return image
    return image.crop((left, top, left + size, top + size))


def to_pixels(image: Image.Image) -> np.ndarray:
    """uint8 `(C, H, W)`."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@dataclass(frozen=True)
class _Decoder(Dataset[Tensor | str]):
    """Chunks of decoded images by their first index; an error comes back as its message, to stay one line."""

    files: Files
    size: int | None
    channels: int
    shape: tuple[int, int, int]

    def __getitem__(self, first: int) -> Tensor | str:
        paths = self.files.paths[first : first + _CHUNK]
        pixels = np.empty((len(paths), *self.shape), dtype=np.uint8)
        try:
            for row, path in zip(pixels, paths, strict=True):
                image = read_image(self.files.folder / path, self.channels)
                image = image if self.size is None else centre(image, self.size, self.size)
                if (image.height, image.width) != self.shape[1:]:
                    raise DataError(
                        f"{self.files.folder / path} has {image.width} x {image.height} pixels, others "
                        f"{self.shape[2]} x {self.shape[1]}: set dataset.image_size to resize all"
                    )
                row[:] = to_pixels(image)
        except DataError as error:
            return str(error)
        return torch.from_numpy(pixels)


def at_most(workers: int) -> int:
    """As many of the processes asked for as this one may use CPUs: more would only make each other wait."""
    return min(workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def decode(files: Files, size: int | None, channels: int, shape: tuple[int, int, int], workers: int) -> Tensor:
    """All images as uint8 `(N, *shape)`.

    Args:
        files: what to read.
        size: cut and resized to this square; None: they must have the same size already.
        channels: 1 or 3.
        shape: `(channels, height, width)` of the result.
        workers: processes that decode when there are many images; 0: this one does.

    Raises:
        DataError: an image that cannot be read, or one of another size.
    """
    loader = DataLoader(
        _Decoder(files, size, channels, shape),
        batch_size=None,
        sampler=range(0, len(files), _CHUNK),
        num_workers=at_most(workers) if len(files) >= _WORTH_WORKERS else 0,
        generator=torch.Generator().manual_seed(0),  # else the global generator would move
    )
    pixels = torch.empty((len(files), *shape), dtype=torch.uint8)
    chunks = -(-len(files) // _CHUNK)
    for chunk, part in enumerate(track(loader, f"decoding {len(files)} images", chunks)):
        if isinstance(part, str):
            raise DataError(part)
        pixels[chunk * _CHUNK : (chunk + 1) * _CHUNK] = part
    return pixels


def decode_cached(
    files: Files, size: int | None, channels: int, shape: tuple[int, int, int], workers: int, cache: Path
) -> Tensor:
    """`decode`, with the pixels kept in `cache`.

    An entry is found by a hash of the files' names, sizes and times of change and of the arguments.

    A damaged entry (zip checksum) is decoded again.

    Raises:
        DataError: as `decode`, or if `cache` cannot be written.
    """
    key = hashlib.sha256(repr((files.digest(times=True), size, channels, shape)).encode()).hexdigest()
    entry = cache / f"{key[:32]}.npz"
    if entry.exists():
        try:
            with np.load(entry, allow_pickle=False) as arrays:
                pixels = arrays["images"]
            if pixels.dtype == np.uint8 and pixels.shape == (len(files), *shape):
                return torch.from_numpy(pixels)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            pass
        _log.warning("%s is damaged: the images are decoded again", entry)
    images = decode(files, size, channels, shape, workers)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=cache, suffix=".npz.part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, images=images.numpy())
            os.replace(scratch, entry)
        except BaseException:
            os.unlink(scratch)
            raise
    except OSError as error:
        raise DataError(f"cannot keep decoded images in {cache} ({error.strerror}): set dataset.cache=null") from None
    return images
