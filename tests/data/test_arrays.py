from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from prune_cli.data.arrays import Data, Split, from_arrays
from prune_cli.data.augment import Augment
from prune_cli.data.dataset import Dataset
from prune_cli.data.fake import fake
from prune_cli.errors import ConfigError, DataError


def numbered(count: int = 100, classes: int = 4, val: float = 0, augment: Augment | None = None) -> Data:
    """Images that carry their own number: pixel (0, 0) of each of the first 256."""
    images = torch.zeros(count, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    train = Split(images, torch.arange(count) % classes)
    test = Split(images[:20], train.labels[:20])
    return from_arrays(
        "numbered",
        train,
        test,
        classes=[f"c{index}" for index in range(classes)],
        mean=(0.0,),
        std=(1.0,),
        val=val,
        augment=augment,
    )


def numbers(x: torch.Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


def test_an_epoch_is_a_shuffle_of_all_images_with_their_labels() -> None:
    batches = numbered().train(32, seed=0)
    seen, labels, sizes = [], [], []
    for x, y in batches.epoch(0):
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        seen += numbers(x)
        labels += y.tolist()
        sizes.append(len(y))
    assert sizes == [32, 32, 32, 4] == [batches.size(step) for step in range(len(batches))]
    assert sorted(seen) == list(range(100)) and seen != list(range(100))
    assert labels == [number % 4 for number in seen]


def test_epochs_are_determined_by_seed_and_epoch() -> None:
    data = fake(train=64, val=0, flip=True)

    def whole(seed: int, epoch: int) -> torch.Tensor:
        return torch.cat([x for x, _ in data.train(16, seed).epoch(epoch)])

    torch.manual_seed(1)
    first = whole(0, 0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(whole(0, 0), first)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was neither read nor moved
    assert not torch.equal(whole(0, 1), first)
    assert not torch.equal(whole(1, 0), first)


def test_an_epoch_entered_in_its_middle_goes_on_with_the_same_batches() -> None:
    batches = fake(train=200, val=0, flip=True).train(32, seed=5)
    whole = list(batches.epoch(3))
    for start in range(len(batches) + 1):
        rest = list(batches.epoch(3, start))
        assert len(rest) == len(batches) - start
        for (x, y), (x_whole, y_whole) in zip(rest, whole[start:], strict=True):
            assert torch.equal(x, x_whole) and torch.equal(y, y_whole)


def test_shards_are_slices_of_the_whole_batch() -> None:
    data = fake(train=100, val=0, flip=True)
    whole = list(data.train(30, 0).epoch(1))
    parts = [list(data.train(30, 0, shard=(rank, 3)).epoch(1)) for rank in range(3)]
    for step, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), x)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), y)
    test = list(data.evaluation("test", 50))
    halves = [list(data.evaluation("test", 50, shard=(rank, 2))) for rank in range(2)]
    assert torch.equal(torch.cat([half[0][0] for half in halves]), test[0][0])


def test_val_is_held_out_of_train_and_stratified() -> None:
    data = numbered(val=0.2)
    assert data.has_val and data.sizes == {"train": 80, "val": 20, "test": 20}
    train = [n for x, _ in data.evaluation("train", 50) for n in numbers(x)]
    val = [n for x, _ in data.evaluation("val", 50) for n in numbers(x)]
    assert sorted(train + val) == list(range(100))
    assert np.bincount(data.splits["val"].labels).tolist() == [5, 5, 5, 5]
    trained_on = {n for epoch in range(3) for x, _ in data.train(32, 0).epoch(epoch) for n in numbers(x)}
    assert trained_on == set(train)
    assert {n for x, _ in data.calibration(80, 32) for n in numbers(x)} == set(train)


def test_no_val_split_when_none_is_held_out() -> None:
    data = numbered(val=0)
    assert not data.has_val and data.sizes["train"] == 100
    with pytest.raises(ConfigError, match=r"numbered has no val split.*dataset.val=0.1"):
        data.evaluation("val", 10)
    with pytest.raises(ConfigError, match="'valid' is unknown"):
        data.evaluation("valid", 10)


def test_evaluation_is_in_order_plain_and_repeatable() -> None:
    data = numbered(augment=Augment(2, True))
    loader = data.evaluation("train", 32)
    for _ in range(2):
        assert [n for x, _ in loader for n in numbers(x)] == list(range(100))
    assert len(loader) == 4


@pytest.mark.parametrize("limit", [None, 3])
def test_shards_of_calibration_have_the_batches_of_one(limit: int | None) -> None:
    data = numbered().limit(limit)
    whole = [numbers(x) for x, _ in data.calibration(18, 4)]
    dealt = [[numbers(x) for x, _ in data.calibration(18, 4, shard=(rank, 2))] for rank in range(2)]
    assert dealt == [whole[0::2], whole[1::2]]


def test_calibration_is_balanced_fixed_and_plain() -> None:
    data = numbered(augment=Augment(2, True))
    first = list(data.calibration(10, 4))
    assert [len(y) for _, y in first] == [4, 4, 2]
    chosen = [n for x, _ in first for n in numbers(x)]
    assert len(set(chosen)) == 10
    counts = np.bincount([n % 4 for n in chosen])
    assert counts.max() - counts.min() == 1
    assert chosen == [n for x, _ in data.calibration(10, 4) for n in numbers(x)]
    assert sum(len(y) for _, y in data.calibration(1000, 64)) == 100  # all there are
    with pytest.raises(ConfigError):
        data.calibration(4, 0)


def test_limit_stops_everything_and_can_be_lifted() -> None:
    data = numbered(val=0.2)
    short = data.limit(2)
    batches = short.train(10, 0)
    whole = list(data.train(10, 0).epoch(0))
    assert len(batches) == 2
    for (x, _), (x_whole, _) in zip(batches.epoch(0), whole[:2], strict=True):
        assert torch.equal(x, x_whole)
    for loader in (short.evaluation("test", 5), short.evaluation("val", 5), short.calibration(30, 5)):
        assert len(loader) == 2 == len(list(loader))
    assert len(short.limit(None).train(10, 0)) == 8
    with pytest.raises(ConfigError, match="limit_batches=0"):
        data.limit(0)


def test_fingerprint_covers_pixels_labels_and_splits() -> None:
    data = numbered()
    assert data.fingerprint == numbered().fingerprint
    assert len(data.fingerprint) == 64
    splits = data.splits
    altered_pixels, altered_labels = splits["test"].images.clone(), splits["train"].labels.clone()
    altered_pixels[7, 0, 3, 3] ^= 1
    altered_labels[0] = 3

    def rebuilt(train: Split, test: Split, **changes: float) -> str:
        return from_arrays("x", train, test, classes=data.classes, mean=(0.0,), std=(1.0,), **changes).fingerprint

    assert rebuilt(splits["train"], splits["test"]) == data.fingerprint
    assert rebuilt(splits["train"], Split(altered_pixels, splits["test"].labels)) != data.fingerprint
    assert rebuilt(Split(splits["train"].images, altered_labels), splits["test"]) != data.fingerprint
    one = rebuilt(splits["train"], splits["test"], val=0.1, split_seed=0)
    two = rebuilt(splits["train"], splits["test"], val=0.1, split_seed=1)
    assert len({one, two, data.fingerprint}) == 3


def test_to_keeps_everything_but_the_place() -> None:
    data: Dataset = numbered(val=0.2)
    moved = data.to("meta")
    assert moved.device.type == "meta" and data.device.type == "cpu"
    assert moved.fingerprint == data.fingerprint and moved.sizes == data.sizes
    assert moved.shape == (1, 4, 4) and moved.num_classes == 4 and moved.classes == ("c0", "c1", "c2", "c3")


def test_data_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        numbered().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]), "need uint8"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 2]), r"outside \[0, 2\)"),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), "one int64 each"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "at least one image"),
        (
            torch.zeros(2, 3, 2, 2, dtype=torch.uint8),
            torch.tensor([0, 1]),
            "3 channels, but mean and std for 1",
        ),
    ],
)
def test_wrong_arrays_are_named(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    split = Split(images, labels)
    with pytest.raises(DataError, match=message):
        from_arrays("mine", split, split, classes=["a", "b"], mean=(0.0,), std=(1.0,))


def test_one_class_is_refused() -> None:
    split = Split(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 0]))
    with pytest.raises(DataError, match="at least two"):
        from_arrays("mine", split, split, classes=["a"], mean=(0.0,), std=(1.0,))


@pytest.mark.parametrize("keys", [{"crop_padding": 0}, {"crop_padding": 1, "flip": True}, {"crop_padding": 2}])
@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_rows_say_where_the_images_of_a_batch_stand_among_all_views(keys: dict, shard: tuple[int, int]) -> None:
    data = fake((3, 6, 6), 3, train=21, test=4, val=3, **keys)
    whole = torch.cat(list(data.views.batches(7)))
    assert len(whole) == len(data.views) == 18 * data.augment.views
    assert torch.equal(torch.cat(list(data.views.batches(7, 14))), whole[14:]), "cut between two batches"
    batches = data.train(8, 5, shard=shard)
    for (images, _), rows in zip(batches.epoch(3, 1), batches.rows(3, 1), strict=True):
        assert torch.equal(whole[rows], images)


def test_views_are_other_ones_where_a_pixel_would_be() -> None:
    plain = fake((3, 6, 6), 3, train=20, test=4)
    others = [
        fake((3, 6, 6), 3, train=20, test=4, **keys) for keys in ({"seed": 1}, {"flip": True}, {"normalize": "none"})
    ]
    assert len({data.views.fingerprint for data in [plain, *others]}) == 4
    assert plain.limit(1).views.fingerprint == plain.views.fingerprint
