"""Filters by what they have in common: one representative of every cluster stays."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from prune_cli.criteria.criterion import LayerView

RESTARTS = 10


def clustering(view: LayerView, *, cosine: bool = False) -> Tensor:
    """k-means with as many clusters as filters will be kept; the filter nearest each centroid stays: (channels,).

    The representatives score 2, so exactly they rank highest. Every other filter scores its distance from its own
    representative, scaled into [0, 1): should more be kept, then those that no representative resembles. Filters that
    are 0 already form no cluster.

    Args:
        cosine: compare directions: filters are scaled to length 1 first.
    """
    if view.n_keep is None:
        raise ValueError("clustering needs the number of filters to keep")
    filters = view.filters.detach().double().cpu()
    scores = torch.zeros(len(filters), dtype=torch.float64)
    alive = filters.abs().sum(1).nonzero().flatten()
    if len(alive) <= view.n_keep:
        scores[alive] = 2
        return scores.to(view.weight.device)
    if view.n_keep > 0:
        points = filters[alive]
        if cosine:
            points = points / points.norm(dim=1, keepdim=True)
        scores[alive] = _representatives(_compact(points), view.n_keep)
    return scores.to(view.weight.device)


def _compact(points: Tensor) -> Tensor:
    """The same points in no more dimensions than there are points: k-means reads nothing but distances."""
    if points.shape[1] <= len(points):
        return points
    left, values, _ = torch.linalg.svd(points, full_matrices=False)
    return left * values


def _representatives(points: Tensor, count: int) -> Tensor:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different filters than clusters
        found = KMeans(count, n_init=RESTARTS, random_state=0).fit(points.numpy())
    labels = torch.from_numpy(found.labels_).long()
    centroids = torch.from_numpy(found.cluster_centers_)
    distances = (points - centroids[labels]).norm(dim=1)
    chosen = []
    for cluster in range(count):
        members = (labels == cluster).nonzero().flatten()
        if len(members):  # duplicates can leave a cluster empty
            chosen.append(int(members[distances[members].argmin()]))
    representative = torch.zeros(count, dtype=torch.long)
    representative[labels[chosen]] = torch.tensor(chosen)
    apart = (points - points[representative[labels]]).norm(dim=1)
    scores = apart / (1 + apart)
    scores[chosen] = 2
    return scores
