"""MNIST and Fashion-MNIST from written IDX files (the real ones are not shipped), whole and damaged."""

from __future__ import annotations

import gzip
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prune_cli.data import mnist as module
from prune_cli.data.mnist import FASHION_MNIST, MNIST, fashion_mnist, fetch, load, mnist, read_idx
from prune_cli.errors import DataError

TRAIN, TEST = 30, 20
SMALL = replace(MNIST, images={"train": TRAIN, "test": TEST})
IMAGES = "train-images-idx3-ubyte"


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write(folder: Path, *, compressed: bool = True) -> dict[str, np.ndarray]:
    """The four files, and what is in them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        made[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        made[f"{part}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for name, values in made.items():
        content = idx(values)
        (folder / (f"{name}.gz" if compressed else name)).write_bytes(gzip.compress(content) if compressed else content)
    return made


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw", "."])
def test_files_are_found_and_read_compressed_or_not(tmp_path: Path, folder: str, compressed: bool) -> None:
    made = write(tmp_path / folder, compressed=compressed)
    splits = load(SMALL, tmp_path, download=False)
    assert torch.equal(splits["train"].images[:, 0], torch.from_numpy(made[IMAGES]))
    assert splits["test"].labels.tolist() == [index % 10 for index in range(TEST)]
    assert splits["train"].images.shape == (TRAIN, 1, 28, 28) and splits["test"].images.dtype == torch.uint8


@pytest.mark.parametrize(("make", "name"), [(mnist, "MNIST"), (fashion_mnist, "FASHION_MNIST")])
def test_as_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make, name: str) -> None:
    monkeypatch.setattr(module, name, replace(getattr(module, name), images=SMALL.images))
    write(tmp_path)
    data = make(str(tmp_path), val=10)
    assert data.sizes == {"train": 20, "val": 10, "test": 20} and data.shape == (1, 28, 28)
    assert data.name == name.lower() and data.num_classes == 10
    with pytest.raises(DataError, match=r"is not in .*mnist.*dataset.download=true"):
        make(str(tmp_path / "nowhere"))


DAMAGES = {
    "cut short": (lambda raw: raw[:-1], r"holds 23535 bytes instead of 23536"),
    "longer": (lambda raw: raw + b"\0", "holds more bytes instead of 23536"),
    "empty": (lambda raw: b"", "is no IDX file of 30 x 28 x 28 bytes"),
    "other sizes": (lambda raw: raw[:4] + struct.pack(">I", 31) + raw[8:], "is no IDX file of 30 x 28 x 28 bytes"),
    "other type": (lambda raw: raw[:2] + b"\x0d" + raw[3:], "is no IDX file"),
    "text": (lambda raw: b"<html>not found</html>", "is no IDX file"),
}


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, damage: str, compressed: bool) -> None:
    change, message = DAMAGES[damage]
    made = write(tmp_path, compressed=compressed)
    content = change(idx(made[IMAGES]))
    victim = tmp_path / (f"{IMAGES}.gz" if compressed else IMAGES)
    victim.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(DataError, match=message) as caught:
        load(SMALL, tmp_path, download=False)
    assert IMAGES in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[:-9],
        lambda raw: raw[:200] + bytes([raw[200] ^ 255]) + raw[201:],
        lambda raw: raw[:-6] + bytes([raw[-6] ^ 1]) + raw[-5:],
        lambda raw: b"no gzip at all",
    ],
    ids=["cut", "a flipped byte", "a wrong checksum", "text"],
)
def test_damaged_compression_is_one_line(tmp_path: Path, change) -> None:
    write(tmp_path)
    victim = tmp_path / f"{IMAGES}.gz"
    victim.write_bytes(change(victim.read_bytes()))
    with pytest.raises(DataError, match=IMAGES) as caught:
        load(SMALL, tmp_path, download=False)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_left_after_the_bytes_that_should_be_there(tmp_path: Path) -> None:
    header = struct.pack(">HBBI", 0, 8, 1, 10)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(header + bytes(1 << 28), compresslevel=1))
    with pytest.raises(DataError, match="holds more bytes instead of 18"):
        read_idx(tmp_path / "bomb.gz", (10,))


def test_what_is_no_file_and_labels_out_of_range(tmp_path: Path) -> None:
    write(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.full(TRAIN, 10)))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte has a label outside \[0, 10\)"):
        load(SMALL, tmp_path, download=False)
    labels.unlink()
    os.mkfifo(labels)
    with pytest.raises(DataError, match="it is no file"):
        load(SMALL, tmp_path, download=False)
    labels.unlink()
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"can't read .*train-labels-idx1-ubyte.gz"):
        load(SMALL, tmp_path, download=False)


def test_files_that_lie_there_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import utils

    asked = []

    def no_network(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise OSError("no route\nto host")

    monkeypatch.setattr(utils, "download_url", no_network)
    write(tmp_path / "mnist")
    load(SMALL, tmp_path, download=True)
    assert not asked
    with pytest.raises(DataError, match=r"failed \(no route\): fetch its four files elsewhere") as caught:
        fetch(FASHION_MNIST, tmp_path)
    assert "\n" not in str(caught.value) and len(asked) == 1
