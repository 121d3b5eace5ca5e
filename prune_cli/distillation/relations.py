"""What images are to each other in the student is what they are to each other in the teacher: distances, angles, products.

Features may have other sizes in the teacher than in the student, as only relations between the images of a batch are compared.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from prune_cli.distillation.distillation import Outputs
from prune_cli.errors import ConfigError

Weight = Annotated[float, Field(ge=0)]


def rkd(
    student: Outputs,
    teacher: Outputs,
    labels: Tensor,
    *,
    distance: Weight = 25.0,
    angle: Weight = 50.0,
) -> Tensor:
    """Huber losses between all distances, and between all angles, of the images of a batch, summed over the features.

    Relational knowledge distillation (Park et al., arXiv:1904.05068, eq. 5 to 9). Distances are divided by their mean in
    the batch. Maps are averaged over positions first, as before a classifier.

    Args:
        distance, angle: weights of the two; 25 and 50 in the tables that others compare with.

    Raises:
        ConfigError: there are no features.
    """
    terms = []
    for own, taught in _embeddings(student, teacher):
        far = F.smooth_l1_loss(distances(own), distances(taught))
        bent = F.smooth_l1_loss(angles(own), angles(taught)) if angle else far.new_zeros(())
        terms.append(distance * far + angle * bent)
    return torch.stack(terms).sum()


def similarity(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """1 / b^2 || G_T - G_S ||_F^2 with G the products of all images of a batch, rows of length 1; summed over features.

    Similarity-preserving distillation (Tung and Mori, arXiv:1907.09682, eq. 1 to 4), with whole maps as vectors.

    Raises:
        ConfigError: there are no features.
    """
    _require_features(student)
    terms = [
        (_products(teacher.features[name]) - _products(own)).square().mean() for name, own in student.features.items()
    ]
    return torch.stack(terms).sum()


def distances(vectors: Tensor) -> Tensor:
    """Of all pairs of images, divided by the mean of those between different ones: (batch, batch), 0 on the diagonal."""
    squared = (vectors[:, None] - vectors[None]).square().sum(2)
    found = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)  # a gradient at 0 would be infinite
    count = len(found) * (len(found) - 1)
    return found / (found.sum() / max(count, 1)).clamp_min(torch.finfo(found.dtype).tiny)


def angles(vectors: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, for all triples: (batch j, batch i, batch k)."""
    edges = F.normalize(vectors[None] - vectors[:, None], dim=2)
    return edges @ edges.mT


def _products(features: Tensor) -> Tensor:
    flat = features.flatten(1)
    return F.normalize(flat @ flat.mT, dim=1)


def _embeddings(student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    _require_features(student)
    pairs = [(own, teacher.features[name]) for name, own in student.features.items()]
    return [(_pooled(own), _pooled(taught)) for own, taught in pairs]


def _pooled(features: Tensor) -> Tensor:
    return features.flatten(2).mean(2) if features.dim() > 2 else features


def _require_features(student: Outputs) -> None:
    if not student.features:
        raise ConfigError("relations are those of features; give features=auto or a list of modules")
