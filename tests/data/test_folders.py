"""Folders of class folders, in memory and lazily, from generated images."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prune_cli.data import files
from prune_cli.data.arrays import Data
from prune_cli.data.files import centre, scan
from prune_cli.data.folders import image_folder
from prune_cli.data.imagenet import imagenet
from prune_cli.data.lazy import Crops, LazyData, random_crop
from prune_cli.data.splits import generator
from prune_cli.errors import ConfigError, DataError


def make(root: Path, splits: dict[str, int], *, classes: str = "cat dog", size: tuple[int, int] = (8, 8)) -> Path:
    """Writes `count` random PNG images per class and split; split "" means the root itself."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for name in classes.split():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:03d}.png")
    return root


def lazily(root: Path, **keys) -> LazyData:
    data = image_folder(str(root), image_size=8, max_in_memory=0, workers=0, **keys)
    assert isinstance(data, LazyData)
    return data


def test_pixels_and_labels_are_those_of_the_files(tmp_path: Path) -> None:
    make(tmp_path, {"train": 3, "test": 2})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    data = image_folder(str(tmp_path), val=0)
    assert isinstance(data, Data)
    assert data.classes == ("cat", "dog") and data.sizes == {"train": 6, "test": 4} and data.shape == (3, 8, 8)
    assert data.splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = np.asarray(Image.open(tmp_path / "train" / "dog" / "001.png"))
    assert np.array_equal(data.splits["train"].images[4].permute(1, 2, 0).numpy(), pixels)
    assert data.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, channels: int) -> None:
    make(tmp_path, {"train": 2, "test": 2})
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(tmp_path / "train" / "cat" / "000.png")
    found = image_folder(str(tmp_path), channels=channels).splits["train"].images[0]
    assert np.array_equal(found.numpy(), np.broadcast_to(deep // 257, (channels, 8, 8)))


def test_one_channel_and_own_statistics(tmp_path: Path) -> None:
    make(tmp_path, {"train": 2, "test": 1})
    data = image_folder(str(tmp_path), channels=1, mean=[0.4], std=[0.2])
    assert data.shape == (1, 8, 8) and data.mean == (0.4,)
    grey = np.asarray(Image.open(tmp_path / "test" / "cat" / "000.png").convert("L"))
    assert np.array_equal(data.splits["test"].images[0, 0].numpy(), grey)


def test_the_splits_of_every_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    three = make(tmp_path / "three", {"train": 10, "val": 3, "test": 2})
    assert image_folder(str(three)).sizes == {"train": 20, "val": 6, "test": 4}
    assert image_folder(str(three), val=0).sizes == {"train": 20, "test": 4}
    with pytest.raises(ConfigError, match="has a val folder"):
        image_folder(str(three), val=0.1)
    two = make(tmp_path / "two", {"train": 10, "val": 3})
    assert image_folder(str(two), val=0.1).sizes == {"train": 18, "val": 2, "test": 6}
    assert "its val folder is the test split" in caplog.text
    flat = make(tmp_path / "flat", {"": 10})
    data = image_folder(str(flat), test=0.3, val=4)
    assert data.sizes == {"train": 10, "val": 4, "test": 6}
    assert "6 of its images are held out" in caplog.text
    assert isinstance(data, Data)
    everything = torch.cat([split.images for split in data.splits.values()]).flatten(1)
    assert len(everything.unique(dim=0)) == 20  # no image twice
    with pytest.raises(ConfigError, match="leaves no test images"):
        image_folder(str(flat), test=0)


def test_resizing_keeps_the_middle(tmp_path: Path) -> None:
    make(tmp_path, {"train": 2, "test": 1}, size=(20, 12))
    data = image_folder(str(tmp_path), image_size=6)
    assert isinstance(data, Data) and data.shape == (3, 6, 6)
    image = Image.open(tmp_path / "train" / "cat" / "000.png").resize((10, 6), Image.Resampling.BILINEAR)
    expected = np.asarray(image.crop((2, 0, 8, 6)))
    assert np.array_equal(data.splits["train"].images[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [(40, 30), (31, 57), (24, 24), (33, 33)])
def test_centre_is_torchvisions_resize_and_centre_crop(size: tuple[int, int]) -> None:
    from torchvision import transforms

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    theirs = transforms.CenterCrop(21)(transforms.Resize(24)(image))
    assert np.array_equal(np.asarray(centre(image, 24, 21)), np.asarray(theirs))


def test_workers_decode_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"train": 9, "test": 4})
    alone = image_folder(str(tmp_path), workers=0)
    monkeypatch.setattr(files, "_WORTH_WORKERS", 1)
    monkeypatch.setattr(files, "_CHUNK", 4)
    state = torch.get_rng_state()
    assert image_folder(str(tmp_path), workers=2).fingerprint == alone.fingerprint
    assert torch.equal(torch.get_rng_state(), state)


def test_cache_gives_the_same_and_notices_changes_and_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root, cache = make(tmp_path / "data", {"train": 3, "test": 2}), tmp_path / "cache"
    plain = image_folder(str(root))
    assert image_folder(str(root), cache=str(cache)).fingerprint == plain.fingerprint
    assert len(list(cache.iterdir())) == 2  # one file per split, no left-overs

    with monkeypatch.context() as patch:
        patch.setattr(files, "decode", None)  # would fail if it were called
        assert image_folder(str(root), cache=str(cache)).fingerprint == plain.fingerprint

    for entry in cache.iterdir():
        raw = bytearray(entry.read_bytes())
        raw[len(raw) // 2] ^= 1
        entry.write_bytes(raw)
    assert image_folder(str(root), cache=str(cache)).fingerprint == plain.fingerprint
    assert "damaged" in caplog.text

    image = root / "train" / "cat" / "000.png"
    Image.new("RGB", (8, 8)).save(image)
    os.utime(image, ns=(1, 1))
    assert image_folder(str(root), cache=str(cache)).fingerprint == image_folder(str(root)).fingerprint
    assert image_folder(str(root), cache=str(cache)).fingerprint != plain.fingerprint

    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set dataset\.cache=null"):
        image_folder(str(root), cache=str(tmp_path / "file" / "below"))


def expect(message: str, root: Path, **keys) -> None:
    with pytest.raises(DataError, match=message) as caught:
        image_folder(str(root), **keys)
    assert "\n" not in str(caught.value)


def test_folders_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs dataset\.root="):
        image_folder()
    expect(r"there is no folder .*nowhere", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    expect("empty has no images", tmp_path / "empty")
    expect("one class, 'cat'", make(tmp_path / "one", {"train": 2, "test": 2}, classes="cat"))
    expect("has test but no train folder", make(tmp_path / "untrained", {"test": 2}))
    hollow = make(tmp_path / "hollow", {"train": 2, "test": 2})
    (hollow / "train" / "eel").mkdir()
    expect("train/eel holds no images", hollow)
    lacking = make(tmp_path / "lacking", {"train": 2}, classes="cat dog eel")
    make(lacking, {"test": 2}, classes="cat dog")
    expect("test lacks 'eel'", lacking)
    dangling = make(tmp_path / "dangling", {"train": 2, "test": 2})
    (dangling / "train" / "cat" / "x.png").symlink_to("nowhere.png")
    expect(r"cannot read .*train/cat/x\.png: No such file", dangling)
    extra = make(tmp_path / "extra", {"train": 2}, classes="cat dog")
    make(extra, {"test": 2}, classes="cat dog eel")
    expect("test has 'eel' besides", extra)


@pytest.mark.parametrize("content", [b"", b"this is text", None])
def test_unreadable_images_are_named(tmp_path: Path, content: bytes | None) -> None:
    make(tmp_path, {"train": 3, "test": 2})
    victim = tmp_path / "train" / "dog" / "002.png"
    victim.write_bytes(victim.read_bytes()[:-40] if content is None else content)
    expect(r"cannot read the image .*train/dog/002\.png: .*; replace or remove it", tmp_path)
    for workers in (0, 1):
        data = image_folder(str(tmp_path), image_size=8, max_in_memory=0, workers=workers)
        with pytest.raises(DataError, match=r"cannot read the image .*train/dog/002\.png") as caught:
            list(data.train(4, 0).epoch(0))
        assert "\n" not in str(caught.value)


def test_images_of_several_sizes_need_image_size(tmp_path: Path) -> None:
    make(tmp_path, {"train": 2, "test": 2})
    Image.new("RGB", (9, 8)).save(tmp_path / "train" / "dog" / "001.png")
    expect(r"dog/001\.png has 9 x 8 pixels, others 8 x 8: set dataset.image_size", tmp_path)
    assert image_folder(str(tmp_path), image_size=8).shape == (3, 8, 8)


def test_too_large_for_memory_needs_image_size(tmp_path: Path) -> None:
    make(tmp_path, {"train": 2, "test": 2})
    with pytest.raises(ConfigError, match=r"set dataset\.image_size"):
        image_folder(str(tmp_path), max_in_memory=8 * 8 * 8 * 3 - 1)
    assert isinstance(image_folder(str(tmp_path), max_in_memory=8 * 8 * 8 * 3), Data)
    for limit in (0, 8 * 8 * 8 * 3):
        with pytest.raises(ConfigError, match="workers=-1"):
            image_folder(str(tmp_path), image_size=8, max_in_memory=limit, workers=-1)
    assert isinstance(image_folder(str(tmp_path), max_in_memory=8 * 8 * 8 * 3 - 1, image_size=8), LazyData)


def test_lazy_epochs_resume_and_shard_like_those_in_memory(tmp_path: Path) -> None:
    data = lazily(make(tmp_path, {"train": 13, "test": 4}, size=(14, 10)))
    batches = data.train(8, seed=1)
    whole = list(batches.epoch(2))
    assert [len(y) for _, y in whole] == [8, 8, 8, 2] == [batches.size(step) for step in range(len(batches))]
    again = list(batches.epoch(2, 2))
    for (x, y), (x_whole, y_whole) in zip(again, whole[2:], strict=True):
        assert torch.equal(x, x_whole) and torch.equal(y, y_whole)
    parts = [list(data.train(8, 1, shard=(rank, 2)).epoch(2)) for rank in range(2)]
    for step, (x, _) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), x)
    other = torch.cat([x for x, _ in batches.epoch(3)])
    assert not torch.equal(torch.cat([x for x, _ in whole]), other)


def test_lazy_batches_do_not_depend_on_workers(tmp_path: Path) -> None:
    root = make(tmp_path, {"train": 10, "test": 4}, size=(14, 10))
    alone = lazily(root)
    helped = image_folder(str(root), image_size=8, max_in_memory=0, workers=2)
    state = torch.get_rng_state()
    for (x, y), (x2, y2) in zip(alone.train(8, 0).epoch(0), helped.train(8, 0).epoch(0), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert torch.equal(torch.get_rng_state(), state)


def test_lazy_evaluation_calibration_and_limit(tmp_path: Path) -> None:
    root = make(tmp_path, {"train": 10, "test": 5}, size=(12, 10))
    data = lazily(root, val=0.2, normalize="none")
    assert data.sizes == {"train": 16, "val": 4, "test": 10} and data.has_val and data.shape == (3, 8, 8)
    x, y = next(iter(data.evaluation("test", 10)))
    assert y.tolist() == [0] * 5 + [1] * 5
    expected = np.asarray(centre(Image.open(root / "test" / "dog" / "004.png"), 8, 8)).transpose(2, 0, 1)
    assert torch.equal((x[9] * 255).round().to(torch.uint8), torch.from_numpy(expected.copy()))
    held = image_folder(str(root), image_size=8, val=0.2, normalize="none")
    for split in ("train", "val", "test"):
        for ours, theirs in zip(data.evaluation(split, 7), held.evaluation(split, 7), strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    one, two = (torch.cat([y for _, y in data.calibration(7, 3)]) for _ in range(2))
    assert torch.equal(one, two) and sorted(torch.bincount(one).tolist()) == [3, 4]
    short = data.limit(1)
    assert len(list(short.evaluation("val", 2))) == len(list(short.train(4, 0).epoch(0))) == 1
    assert len(short.calibration(8, 2)) == 1
    train, val = (set(data.splits[split].paths) for split in ("train", "val"))
    assert not train & val and len(train | val) == 20
    with pytest.raises(ConfigError, match="image_folder has no val split"):
        lazily(root, val=0).evaluation("val", 2)


def test_lazy_fingerprint_follows_the_content_not_the_place(tmp_path: Path) -> None:
    one, two = (lazily(make(tmp_path / name, {"train": 4, "test": 2})) for name in "ab")
    assert one.fingerprint == two.fingerprint
    assert lazily(tmp_path / "a", val=0.25).fingerprint != one.fingerprint
    image = tmp_path / "b" / "test" / "cat" / "000.png"
    image.write_bytes(image.read_bytes() + b"\0")
    assert lazily(tmp_path / "b").fingerprint != one.fingerprint


def test_random_crops_have_the_stated_distribution() -> None:
    # A picture whose pixels are their own coordinates: the crop's corners can be read off.
    rows, columns = np.mgrid[0:200, 0:200].astype(np.uint8)
    picture = Image.fromarray(np.stack([rows, columns, np.zeros_like(rows)], axis=2))
    areas, ratios, mirrored = [], [], 0
    for index in range(600):
        crop = np.asarray(random_crop(picture, Crops(50, 50, (0.1, 0.4), True), generator(index))).astype(int)
        height, width = (np.ptp(crop[..., channel]) * 50 / 49 for channel in (0, 1))
        areas.append(height * width / 40_000)
        ratios.append(width / height)
        mirrored += crop[0, 0, 1] > crop[0, -1, 1]
    assert 0.09 < min(areas) < 0.13 and 0.37 < max(areas) < 0.43
    assert abs(np.mean(areas) - 0.25) < 0.02  # uniform: the middle of 0.1 and 0.4
    assert min(ratios) > 0.72 and max(ratios) < 1.4 and abs(np.mean(np.log(ratios))) < 0.04
    assert 240 < mirrored < 360


def test_random_crop_of_a_sliver_falls_back_to_its_middle() -> None:
    sliver = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(4, axis=0))
    crop = np.asarray(random_crop(sliver, Crops(4, 4, (1.0, 1.0), False), generator(0)))
    assert crop.shape == (4, 4) and 45 < crop.mean() < 55


@pytest.mark.parametrize("crops", [Crops(0, 8), Crops(9, 8), Crops(8, 8, (0.0, 1.0)), Crops(8, 8, (0.5, 0.4))])
def test_crops_that_make_no_sense(crops: Crops) -> None:
    with pytest.raises(ConfigError, match="need"):
        crops.check()


def test_imagenet_tests_on_its_val_folder(tmp_path: Path) -> None:
    make(tmp_path, {"train": 10, "val": 3}, classes="n01 n02 n03", size=(20, 16))
    data = imagenet(str(tmp_path), image_size=8, resize=10, val=0.1, workers=0)
    assert isinstance(data, LazyData)
    assert data.sizes == {"train": 27, "val": 3, "test": 9} and data.classes == ("n01", "n02", "n03")
    assert next(iter(data.train(4, 0).epoch(0)))[0].shape == (4, 3, 8, 8)
    with pytest.raises(DataError, match=r"put train/CLASS/\*.JPEG and val/CLASS/\*.JPEG there"):
        imagenet(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="image_size=224, resize=100"):
        imagenet(str(tmp_path), resize=100)


def test_scan_reads_folders_below_a_class(tmp_path: Path) -> None:
    make(tmp_path, {"": 1})
    (tmp_path / "cat" / "below").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "below" / "X.JPEG")
    assert scan(tmp_path).paths == ("cat/000.png", "cat/below/X.JPEG", "dog/000.png")
