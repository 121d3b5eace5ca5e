"""digits, fake, and the keys that all datasets share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prune_cli.data.cifar import cifar10, cifar100
from prune_cli.data.digits import digits
from prune_cli.data.fake import fake
from prune_cli.data.folders import image_folder
from prune_cli.data.imagenet import imagenet
from prune_cli.data.normalization import statistics
from prune_cli.errors import ConfigError


def test_digits_are_scikit_learns_with_a_fixed_stratified_test_split() -> None:
    from sklearn.datasets import load_digits

    data, other = digits(val=0), digits(val=0.25, split_seed=9)
    assert data.shape == (1, 8, 8) and data.sizes == {"train": 1437, "test": 360}
    assert torch.equal(data.splits["test"].images, other.splits["test"].images)
    assert np.bincount(data.splits["test"].labels).min() >= 34  # 174 to 183 of each digit in all
    ours = torch.cat([split.images for split in data.splits.values()]).flatten(1).double() * 16 / 255
    theirs = torch.from_numpy(load_digits().data)
    assert (ours.round() - ours).abs().max() < 0.04  # rounding to a byte is undone by rounding to a level
    assert sorted(ours.round().tolist()) == sorted(theirs.tolist())


def test_digits_resized_and_coloured() -> None:
    nearest = digits(image_size=16, interpolation="nearest", channels=3)
    plain = digits()
    assert nearest.shape == (3, 16, 16)
    assert torch.equal(nearest.splits["test"].images[:, 1, ::2, ::2], plain.splits["test"].images[:, 0])
    smooth = digits(image_size=32)
    assert smooth.shape == (1, 32, 32)
    pixels, small = smooth.splits["test"].images.float(), plain.splits["test"].images.float()
    assert (pixels.mean() - small.mean()).abs() < 1
    with pytest.raises(ConfigError, match="image_size=0"):
        digits(image_size=0)


def test_digits_are_normalised_to_mean_zero_and_std_one() -> None:
    x = torch.cat([x for split in ("train", "test") for x, _ in digits(val=0).evaluation(split, 500)])
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01


def test_fake_images_can_be_learnt() -> None:
    data = fake(shape=(1, 8, 8), num_classes=5, train=200, test=100, val=0)
    x, y = next(iter(data.evaluation("train", 200)))
    centres = torch.stack([x[y == c].mean(0) for c in range(5)])
    x_test, y_test = next(iter(data.evaluation("test", 100)))
    nearest = torch.cdist(x_test.flatten(1), centres.flatten(1)).argmin(1)
    assert (nearest == y_test).float().mean() > 0.95


def test_fake_is_determined_by_its_seed() -> None:
    assert fake().fingerprint == fake().fingerprint != fake(seed=1).fingerprint
    assert fake().sizes == {"train": 461, "val": 51, "test": 256}


@pytest.mark.parametrize(
    ("data", "name", "shape", "classes"),
    [
        (digits(fake=True, image_size=16), "digits", (1, 16, 16), 10),
        (cifar10(fake=True), "cifar10", (3, 32, 32), 10),
        (cifar100(fake=True), "cifar100", (3, 32, 32), 100),
        (imagenet(fake=True, image_size=64, resize=72), "imagenet", (3, 64, 64), 1000),
        (image_folder(fake=True, image_size=24), "image_folder", (3, 24, 24), 10),
    ],
)
def test_stand_ins_have_the_name_shape_and_classes_of_the_real_thing(
    data, name: str, shape: tuple[int, int, int], classes: int
) -> None:
    assert (data.name, data.shape, data.num_classes, len(data.classes)) == (name, shape, classes, classes)
    x, y = next(iter(data.train(8, 0).epoch(0)))
    assert x.shape == (8, *shape) and y.max() < classes


def test_stand_ins_scale_a_number_of_held_out_images() -> None:
    assert cifar10(fake=True, val=5000).sizes == {"train": 461, "val": 51, "test": 256}
    assert not cifar10(fake=True, val=0).has_val


def test_statistics_by_name_and_by_number() -> None:
    assert statistics("imagenet", None, None, 3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert statistics("half", None, None, 3) == ((0.5,) * 3, (0.5,) * 3)
    assert statistics("imagenet", [0.1, 0.2, 0.3], [1, 2, 3], 3) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert statistics("imagenet", [0.1], [0.2], 2) == ((0.1, 0.1), (0.2, 0.2))
    assert statistics("imagenet", None, None, 1)[0] == pytest.approx((0.449,))
    assert cifar10(fake=True, normalize="imagenet").mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar", None, None, 3), "did you mean"),
        (("half", [0.5], None, 3), "both"),
        (("half", [0.5, 0.5], [0.5, 0.5], 3), "2 numbers for images of 3 channels"),
        (("half", [0.5], [0.0], 1), "must be positive"),
    ],
)
def test_statistics_that_make_no_sense(arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        statistics(*arguments)


def test_wrong_fake_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="channels, height, width"):
        fake(shape=(32, 32))
    with pytest.raises(ConfigError, match="at least 2 classes"):
        fake(num_classes=1)
