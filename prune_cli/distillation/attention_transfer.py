"""Attention transfer: the student looks where its teacher looks."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from prune_cli.distillation.distillation import Outputs
from prune_cli.errors import ConfigError

Power = Annotated[float, Field(ge=1)]


def attention_transfer(
    student: Outputs, teacher: Outputs, labels: Tensor, *, power: Power = 2.0, norm: Power = 2.0
) -> Tensor:
    """1/2 sum_j || Q_S^j / ||Q_S^j||_2 - Q_T^j / ||Q_T^j||_2 ||_p, with Q = vec(sum over channels of |A|^power).

    A mean over images, a sum over the features j, maps (batch, channels, height, width) of which student and teacher
    may have different numbers of channels. Zagoruyko and Komodakis, ICLR 2017 (arXiv:1612.03928), eq. 2 without beta,
    which is `distillation.weight`.

    Args:
        power: exponent of an activation's share in its map; 2 in the paper.
        norm: p of the norm of a difference; 2 in the paper.

    Raises:
        ConfigError: there are no features, or they are no maps, or maps of different sizes.
    """
    if not student.features:
        raise ConfigError("attention is compared on features; give features=auto or a list of modules")
    differences = []
    for name, own in student.features.items():
        taught = teacher.features[name]
        if own.dim() != 4 or taught.dim() != 4 or own.shape[2:] != taught.shape[2:]:
            raise ConfigError(
                f"attention is compared on maps of one size, but {name!r} gives {tuple(own.shape)} and its teacher's "
                f"{tuple(taught.shape)}; name other modules"
            )
        difference = attention(own, power) - attention(taught, power)
        differences.append(torch.linalg.vector_norm(difference, norm, dim=1).mean())
    return torch.stack(differences).sum() / 2


def attention(maps: Tensor, power: float) -> Tensor:
    """The normalised attention map of each image, (batch, height * width)."""
    return F.normalize(maps.abs().pow(power).sum(1).flatten(1), dim=1)
