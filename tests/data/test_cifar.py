"""CIFAR from generated files in the published formats (the real ones are not shipped)."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prune_cli.data import cifar
from prune_cli.data.cifar import CIFAR10, CIFAR100, cifar10, cifar100, fetch, load
from prune_cli.data.cifar_pickle import read_batch
from prune_cli.errors import DataError

COUNT = 20  # images per file instead of 10,000


def pixels_of(name: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return np.random.default_rng(seed).integers(0, 256, (COUNT, 3072), dtype=np.uint8)


def small(layout: cifar.Layout) -> cifar.Layout:
    return replace(layout, binary_files=dict.fromkeys(layout.binary_files, COUNT))


def write_binary(layout: cifar.Layout, root: Path) -> None:
    folder = root / layout.binary_folder
    folder.mkdir(parents=True)
    labels = np.arange(COUNT, dtype=np.uint8)[:, None] % len(layout.classes)
    coarse = np.full((COUNT, layout.label_bytes - 1), 19, np.uint8)
    for name in layout.binary_files:
        records = np.concatenate([coarse, labels, pixels_of(name.removesuffix(".bin"))], axis=1)
        (folder / name).write_bytes(records.tobytes())


def write_python(layout: cifar.Layout, root: Path) -> cifar.Layout:
    """Writes batches as Python 2 style pickles; returns the layout with their MD5s."""
    folder = root / layout.python_folder
    folder.mkdir(parents=True)
    md5s = {}
    for name in layout.python_files:
        batch = {
            b"data": pixels_of(name),
            layout.label_key: [index % len(layout.classes) for index in range(COUNT)],
            b"filenames": [b"a.png"] * COUNT,
        }
        raw = pickle.dumps(batch, protocol=2)
        (folder / name).write_bytes(raw)
        md5s[name] = hashlib.md5(raw).hexdigest()
    return replace(layout, python_files=md5s)


@pytest.mark.parametrize("layout", [CIFAR10, CIFAR100])
def test_binary_and_python_versions_hold_the_same(layout: cifar.Layout, tmp_path: Path) -> None:
    write_binary(layout, tmp_path / "binary")
    layout = write_python(small(layout), tmp_path / "python")
    binary = load(layout, tmp_path / "binary", download=False)
    python = load(layout, tmp_path / "python", download=False)
    files = len(layout.binary_files)
    assert len(binary[0]) == COUNT * (files - 1) and len(binary[1]) == COUNT
    for one, other in zip(binary, python, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    expected = pixels_of(next(iter(layout.python_files)))[3].reshape(3, 32, 32)
    assert torch.equal(binary[0].images[3], torch.from_numpy(expected))
    assert binary[0].labels[:COUNT].tolist() == [index % len(layout.classes) for index in range(COUNT)]


def test_cifar10_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "CIFAR10", small(CIFAR10))
    write_binary(CIFAR10, tmp_path)
    data = cifar10(str(tmp_path), val=10)
    assert data.sizes == {"train": 90, "val": 10, "test": 20}
    assert data.classes[3] == "cat" and data.shape == (3, 32, 32)
    assert np.bincount(data.splits["val"].labels).tolist() == [1] * 10


def test_class_names_are_in_the_published_order() -> None:
    assert len(CIFAR100.classes) == 100 and list(CIFAR100.classes) == sorted(CIFAR100.classes)
    assert CIFAR10.classes[0] == "airplane" and CIFAR10.classes[9] == "truck"


@pytest.mark.parametrize(("make", "layout"), [(cifar10, CIFAR10), (cifar100, CIFAR100)])
def test_missing_data_says_what_to_put_where(make, layout: cifar.Layout, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        make(str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path), layout.binary_folder, layout.python_folder, "dataset.download=true"):
        assert part in message


def test_damaged_binary_files_are_named(tmp_path: Path) -> None:
    layout = small(CIFAR10)
    write_binary(layout, tmp_path)
    folder = tmp_path / layout.binary_folder
    victim = folder / "data_batch_3.bin"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3.bin has 61459 bytes instead of 61460"):
        load(layout, tmp_path, download=False)
    victim.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(DataError, match=r"data_batch_3.bin has a label outside \[0, 10\)"):
        load(layout, tmp_path, download=False)
    victim.unlink()
    with pytest.raises(DataError, match=r"cannot read .*data_batch_3.bin"):
        load(layout, tmp_path, download=False)


def test_python_files_other_than_the_published_are_not_opened(tmp_path: Path) -> None:
    write_python(CIFAR10, tmp_path)
    with pytest.raises(DataError, match="data_batch_1 is not the published file"):
        cifar10(str(tmp_path))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_runs_nothing_even_with_the_right_md5(tmp_path: Path) -> None:
    layout = write_python(CIFAR10, tmp_path)
    victim = tmp_path / layout.python_folder / "data_batch_2"
    raw = pickle.dumps({b"data": Malicious(tmp_path / "owned"), b"labels": [0]}, protocol=2)
    victim.write_bytes(raw)
    layout = replace(layout, python_files={**layout.python_files, "data_batch_2": hashlib.md5(raw).hexdigest()})
    with pytest.raises(DataError, match=r"data_batch_2 is not a CIFAR batch.*asks for .*mkdir") as caught:
        load(layout, tmp_path, download=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()
    pickle.loads(raw)  # the attack is real: a plain unpickler does run it
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2], protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1]}, protocol=2),
        pickle.dumps({b"data": np.array([None], dtype=object), b"labels": [0]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": np.random.default_rng(0)}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [eval]}, protocol=2),
        b"cposix\nsystem\n(S'true'\ntR.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zlibtR.",
    ],
)
def test_anything_but_a_batch_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(DataError, match="batch_9") as caught:
        read_batch(content, b"labels", Path("batch_9"))
    assert "\n" not in str(caught.value)


def test_fortran_order_is_understood() -> None:
    pixels = np.asfortranarray(pixels_of("x"))
    raw = pickle.dumps({b"data": pixels, b"labels": [0] * COUNT}, protocol=2)
    assert np.array_equal(read_batch(raw, b"labels", Path("x"))[0], pixels)


def archive(layout: cifar.Layout, root: Path, where: Path) -> cifar.Layout:
    """The binary version as an archive in `where`, and the layout that expects it."""
    write_binary(layout, root)
    where.mkdir()
    with tarfile.open(where / layout.archive, "w:gz") as tar:
        tar.add(root / layout.binary_folder, layout.binary_folder)
    md5 = hashlib.md5((where / layout.archive).read_bytes()).hexdigest()
    return replace(layout, archive_md5=md5)


def test_an_archive_that_lies_there_is_unpacked_without_a_network(tmp_path: Path) -> None:
    layout = archive(small(CIFAR10), tmp_path / "made", tmp_path / "data")
    train, test = load(layout, tmp_path / "data", download=True)
    assert len(train) == 5 * COUNT and len(test) == COUNT
    assert sorted(os.listdir(tmp_path / "data")) == sorted([layout.archive, layout.binary_folder])


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import utils

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(utils, "download_url", no_network)
    with pytest.raises(DataError, match=r"failed \(no route\): fetch it elsewhere") as caught:
        fetch(CIFAR10, tmp_path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_an_archive_cannot_write_outside(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / CIFAR10.archive, "w:gz") as tar:
        info = tarfile.TarInfo("../outside")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    layout = replace(CIFAR10, archive_md5=hashlib.md5((tmp_path / CIFAR10.archive).read_bytes()).hexdigest())
    with pytest.raises(DataError, match="failed"):
        fetch(layout, tmp_path)
    assert not (tmp_path / "outside").exists() and not (tmp_path.parent / "outside").exists()
