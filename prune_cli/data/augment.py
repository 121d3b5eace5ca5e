"""Augmentation of whole batches of uint8 images, and normalisation to float32.

Random numbers are drawn for an epoch at once, on the CPU, so that they are the same on every device and at
every place an epoch is entered; the pixels are moved on the device the images live on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prune_cli.data.splits import generator
from prune_cli.errors import ConfigError

Padding = Literal["zeros", "reflect"]


@dataclass(frozen=True)
class Augment:
    """Random shifts and mirror images.

    Attributes:
        crop_padding: pixels added on each side before a crop of the original size is taken; 0: no shift.
        flip: mirror left to right, with probability 1/2.
        padding: what is added: `zeros` (black) or `reflect` (the image, mirrored without its edge).
    """

    crop_padding: int = 0
    flip: bool = False
    padding: Padding = "zeros"

    @property
    def views(self) -> int:
        """In how many ways an image may be augmented: places of the crop, mirrored or not."""
        return (2 * self.crop_padding + 1) ** 2 * (2 if self.flip else 1)

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raises ConfigError if images of `shape` (C, H, W) cannot be augmented like this."""
        if self.crop_padding < 0:
            raise ConfigError(f"crop_padding={self.crop_padding}: must be 0 or more pixels")
        if self.padding not in ("zeros", "reflect"):
            raise ConfigError(f"padding={self.padding!r}: choose zeros or reflect")
        if self.padding == "reflect" and self.crop_padding >= min(shape[1:]):
            raise ConfigError(
                f"crop_padding={self.crop_padding}: padding=reflect needs less than the image size, {min(shape[1:])}"
            )


@dataclass(frozen=True, eq=False)
class Draws:
    """One epoch's random numbers, by place in the epoch.

    Attributes:
        order: int64 `(N,)`, the image at each place.
        top, left: int64 `(N,)` in [0, 2 * crop_padding], the corner of the crop in the padded image.
        mirrored: bool `(N,)`.
    """

    order: Tensor
    top: Tensor
    left: Tensor
    mirrored: Tensor

    def to(self, device: torch.device) -> Draws:
        return Draws(self.order.to(device), self.top.to(device), self.left.to(device), self.mirrored.to(device))

    def part(self, start: int, stop: int) -> Draws:
        """The draws of places `start` to `stop`."""
        return Draws(self.order[start:stop], self.top[start:stop], self.left[start:stop], self.mirrored[start:stop])

    def views(self, augment: Augment) -> Tensor:
        """int64 `(N,)` in [0, augment.views): the number of the view at each place; see `in_view`."""
        place = self.top * (2 * augment.crop_padding + 1) + self.left
        return place * 2 + self.mirrored if augment.flip else place


def in_view(view: int, order: Tensor, augment: Augment) -> Draws:
    """Draws that give every image the same view, which has this number in [0, augment.views)."""
    place, mirrored = divmod(view, 2) if augment.flip else (view, 0)
    top, left = divmod(place, 2 * augment.crop_padding + 1)
    same = torch.ones_like(order)
    return Draws(order, same * top, same * left, same * mirrored == 1)


def draw_epoch(total: int, augment: Augment, seed: int, epoch: int) -> Draws:
    """All draws of `epoch` over `total` images: a pure function of its arguments, on the CPU."""
    order = generator("order", seed, epoch).permutation(total)
    rng = generator("augment", seed, epoch)
    corner = rng.integers(0, 2 * augment.crop_padding + 1, size=(2, total))
    mirrored = rng.integers(0, 2, size=total) == 1 if augment.flip else np.zeros(total, dtype=bool)
    return Draws(*(torch.from_numpy(part) for part in (order, corner[0], corner[1], mirrored)))


def shift_and_flip(images: Tensor, draws: Draws, augment: Augment) -> Tensor:
    """Pads, crops and mirrors each image by its own draw, in one gather.

    Args:
        images: uint8 `(B, C, H, W)`, those of `draws.order`.
        draws: of length B.

    Returns:
        uint8 `(B, C, H, W)`.
    """
    if not augment.crop_padding and not augment.flip:
        return images
    channels, height, width = images.shape[1:]
    pad = augment.crop_padding
    rows = draws.top[:, None] + torch.arange(height, device=images.device)
    columns = draws.left[:, None] + torch.arange(width, device=images.device)
    if augment.padding == "reflect":
        rows, columns = _reflect(rows - pad, height), _reflect(columns - pad, width)
    elif pad:
        images = F.pad(images, (pad, pad, pad, pad))
        width += 2 * pad
    columns = torch.where(draws.mirrored[:, None], columns.flip(1), columns)
    place = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    pixels = images.flatten(2).gather(2, place[:, None].expand(-1, channels, -1))
    return pixels.unflatten(2, (rows.shape[1], columns.shape[1]))


def _reflect(place: Tensor, size: int) -> Tensor:
    """Maps places in (-size, 2 * size - 1) into [0, size), mirrored at the first and last pixel."""
    return (size - 1) - ((size - 1) - place.abs()).abs()


def affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 `(C, 1, 1)`, that take a byte x to `(x / 255 - mean) / std`."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    both = torch.tensor([scale, shift], device=device)[..., None, None]
    return both[0], both[1]


def normalise(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 `(B, C, H, W)` to float32 `x * scale + shift`."""
    return images.to(torch.float32).mul_(scale).add_(shift)
