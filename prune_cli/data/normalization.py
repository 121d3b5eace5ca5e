"""Per-channel mean and standard deviation of pixels scaled to [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from prune_cli.errors import ConfigError, nearest

Normalize = Literal["cifar10", "cifar100", "imagenet", "digits", "mnist", "fashion_mnist", "half", "none"]

STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # Over all pixels of the 50,000 training images.
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    # The values that torchvision's pretrained networks were trained with.
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # Over all pixels of the 1,797 digits.
    "digits": ((0.3053,), (0.3760,)),
    # Over all pixels of the 60,000 training images.
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "half": ((0.5,), (0.5,)),
    "none": ((0.0,), (1.0,)),
}


def statistics(
    normalize: str, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for `channels` channels: those given, or those that `normalize` names.

    One number stands for all channels; colour statistics are averaged for images of one channel.

    Raises:
        ConfigError: an unknown name, only one of mean and std, a wrong length, or a std that is not positive.
    """
    if normalize not in STATISTICS:
        raise ConfigError(f"normalize={normalize!r} is unknown{nearest(normalize, STATISTICS)}")
    if (mean is None) != (std is None):
        raise ConfigError("give both dataset.mean and dataset.std, or neither")
    if mean is None or std is None:
        found = [tuple(values) for values in STATISTICS[normalize]]
        if channels == 1:
            found = [(sum(values) / len(values),) for values in found]
    else:
        found = [tuple(float(value) for value in values) for values in (mean, std)]
    found = [values * channels if len(values) == 1 else values for values in found]
    for key, values in zip(("mean", "std"), found, strict=True):
        if len(values) != channels:
            raise ConfigError(f"dataset.{key} has {len(values)} numbers for images of {channels} channels")
    if min(found[1]) <= 0:
        raise ConfigError(f"dataset.std={list(found[1])}: must be positive")
    return found[0], found[1]
