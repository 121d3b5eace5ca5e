"""Weight sharing: few values for many weights, by k-means (Han et al., arXiv:1510.00149, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_cli.errors import CheckpointError

Array = np.ndarray[Any, Any]


# ---------------------------------------------------------------------------------------------- weight sharing


@dataclass(frozen=True)
class Clustered:
    """A weight whose kept entries take few values.

    Attributes:
        codebook: (k,) centroids, increasing, in the weight's type.
        assignment: int64, shaped like the weight: number of the centroid, -1 where the weight is removed.
    """

    codebook: Tensor
    assignment: Tensor

    @property
    def weight(self) -> Tensor:
        """The shared weight: w = codebook[assignment], zero where removed."""
        return torch.where(self.assignment >= 0, self.codebook[self.assignment.clamp_min(0)], 0)


def cluster(weight: Tensor, keep: Tensor, clusters: int) -> Clustered:
    """Clusters the kept weights of a layer by k-means from linearly spaced centroids (section 3).

    Args:
        weight: any shape.
        keep: bool, broadcastable to the weight; the others become zero.
        clusters: at most this many values, at least 1.

    Raises:
        CheckpointError: a kept weight is not finite.
    """
    kept = keep.expand(weight.shape)
    values = weight.detach()[kept].double().cpu().numpy()
    if not np.isfinite(values).all():
        raise CheckpointError("weights that are not finite can't be clustered")
    centroids, numbers = kmeans(values, clusters)
    assignment = torch.full(weight.shape, -1, dtype=torch.int64, device=weight.device)
    assignment[kept] = torch.from_numpy(numbers).to(weight.device)
    return Clustered(torch.from_numpy(centroids).to(weight.device, weight.dtype), assignment)


def kmeans(values: Array, clusters: int, iterations: int = 300) -> tuple[Array, Array]:
    """Lloyd's algorithm on numbers, from centroids spaced evenly between the smallest and the largest.

    On sorted numbers a cluster is a range and its mean a difference of prefix sums, so a step costs O(k log n): the
    same result as scikit-learn's KMeans(init=those centroids, n_init=1), without comparing all with all.
    Clusters that stay empty are dropped.

    Args:
        values: (n,) finite.
        clusters: at least 1.

    Returns:
        Centroids (k,), increasing, and the number of the nearest one for each value.
    """
    if not len(values):
        return np.zeros(0), np.zeros(0, np.int64)
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], clusters)
    borders: Array | None = None
    for _ in range(iterations):
        cuts = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, side="right")
        if borders is not None and np.array_equal(cuts, borders):
            break
        borders = cuts
        ends = np.concatenate([[0], cuts, [len(ordered)]])
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        centroids = np.maximum.accumulate(np.where(counts > 0, means, centroids))
    numbers = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values, side="left")
    used, numbers = np.unique(numbers, return_inverse=True)
    return centroids[used], numbers.reshape(-1).astype(np.int64)


def centroid_gradient(gradient: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """dL/dc_k = sum of dL/dw over the members of cluster k (section 3.3).

    Args:
        gradient: dL/dw.
        assignment: see `Clustered`.
        clusters: length of the codebook.
    """
    members = assignment >= 0
    total = torch.zeros(clusters, dtype=gradient.dtype, device=gradient.device)
    return total.index_add_(0, assignment[members], gradient[members])
