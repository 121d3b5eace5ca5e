from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_cli.data.augment import Augment, Padding, affine, draw_epoch, in_view, normalise, shift_and_flip
from prune_cli.errors import ConfigError


def one_by_one(images: torch.Tensor, augment: Augment, epoch: int) -> torch.Tensor:
    """The plain form: numpy's own padding, a slice and a reversal per image."""
    draws = draw_epoch(len(images), augment, 0, epoch)
    pad, mode = augment.crop_padding, {"zeros": "constant", "reflect": "reflect"}[augment.padding]
    result = []
    for index, top, left, mirrored in zip(draws.order, draws.top, draws.left, draws.mirrored, strict=True):
        image = np.pad(images[index].numpy(), ((0, 0), (pad, pad), (pad, pad)), mode=mode)
        image = image[:, top : top + images.shape[2], left : left + images.shape[3]]
        result.append(image[:, :, ::-1] if mirrored else image)
    return torch.from_numpy(np.stack(result))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from(["zeros", "reflect"]),
    st.sampled_from([(1, 6, 6), (3, 8, 6), (3, 6, 9)]),
    st.integers(0, 3),
)
def test_batched_augmentation_equals_one_by_one(
    pad: int, flip: bool, padding: Padding, shape: tuple[int, int, int], epoch: int
) -> None:
    augment = Augment(pad, flip, padding)
    images = torch.randint(0, 256, (24, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(pad))
    draws = draw_epoch(24, augment, 0, epoch)
    batched = shift_and_flip(images[draws.order], draws, augment)
    assert batched.dtype == torch.uint8
    assert torch.equal(batched, one_by_one(images, augment, epoch))


def test_draws_cover_every_shift_and_both_sides() -> None:
    draws = draw_epoch(4000, Augment(2, True), 0, 0)
    assert sorted(draws.order.tolist()) == list(range(4000))
    assert draws.top.unique().tolist() == draws.left.unique().tolist() == [0, 1, 2, 3, 4]
    assert 0.45 < draws.mirrored.float().mean() < 0.55
    pairs = torch.bincount(draws.top * 5 + draws.left, minlength=25)
    assert pairs.min() > 100  # rows and columns are independent: 160 each on average
    assert not draw_epoch(50, Augment(2, False), 0, 0).mirrored.any()


def test_order_does_not_depend_on_the_augmentation() -> None:
    plain, augmented = draw_epoch(100, Augment(), 3, 7), draw_epoch(100, Augment(4, True), 3, 7)
    assert torch.equal(plain.order, augmented.order)


@pytest.mark.parametrize("augment", [Augment(), Augment(flip=True), Augment(2), Augment(1, True, "reflect")])
def test_every_draw_is_a_view_and_every_view_can_be_drawn(augment: Augment) -> None:
    draws = draw_epoch(2000, augment, 0, 0)
    numbers = draws.views(augment)
    assert sorted(set(numbers.tolist())) == list(range(augment.views))
    for view in range(augment.views):
        same = in_view(view, torch.arange(3), augment)
        assert same.views(augment).tolist() == [view] * 3
    for place in range(50):
        same = in_view(int(numbers[place]), torch.zeros(1, dtype=torch.int64), augment)
        assert (same.top, same.left) == (draws.top[place], draws.left[place])
        assert same.mirrored[0] == draws.mirrored[place]


def test_normalise_follows_the_definition() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    exact = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    got = normalise(images, *affine(mean, std, images.device))
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (Augment(-1), "crop_padding=-1"),
        (Augment(8, padding="reflect"), "reflect needs less than"),
        (Augment(1, padding="edge"), "choose zeros or reflect"),  # type: ignore[arg-type]
    ],
)
def test_augmentation_that_cannot_be_done_is_refused(augment: Augment, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        augment.check((3, 8, 8))
