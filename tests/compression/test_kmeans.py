"""k-means in one dimension: scikit-learn's result, few values, zeros that stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from prune_cli.compression import kmeans
from prune_cli.errors import CheckpointError
from tests.compression.test_codec import sparse


# ------------------------------------------------------------------------------------------------ sharing
@pytest.mark.parametrize(("seed", "clusters"), [(0, 4), (1, 16), (2, 31)])
def test_kmeans_is_that_of_scikit_learn(seed, clusters):
    values = np.random.default_rng(seed).uniform(-1, 2, 3000) ** 3
    start = np.linspace(values.min(), values.max(), clusters)
    reference = KMeans(clusters, init=start[:, None], n_init=1, tol=0, max_iter=300).fit(values[:, None])
    centroids, numbers = kmeans.kmeans(values, clusters)
    assert np.allclose(centroids, np.sort(reference.cluster_centers_[:, 0]), atol=1e-6)
    assert float(((values - centroids[numbers]) ** 2).sum()) == pytest.approx(reference.inertia_, rel=1e-6)


def test_every_value_gets_its_nearest_centroid_and_every_centroid_is_the_mean_of_its_values():
    values = np.concatenate([np.random.default_rng(3).normal(size=500), [40.0]])  # an outlier leaves clusters empty
    centroids, numbers = kmeans.kmeans(values, 32)
    assert len(centroids) < 32 and set(numbers) == set(range(len(centroids)))
    assert np.array_equal(numbers, np.abs(values[:, None] - centroids).argmin(1))
    assert np.allclose(centroids, [values[numbers == k].mean() for k in range(len(centroids))])
    assert len(kmeans.kmeans(np.array([2.0, 2.0]), 8)[0]) == 1
    assert len(kmeans.kmeans(np.zeros(0), 8)[0]) == 0


def test_sharing_leaves_few_values_and_zeros():
    weight, keep = sparse(4, 20, 6, 3, 3)
    shared = kmeans.cluster(weight, keep, 15)
    assert (shared.weight[~keep] == 0).all()
    assert torch.equal(torch.unique(shared.weight[keep]), shared.codebook)
    assert len(shared.codebook) <= 15
    assert float((shared.weight - weight * keep).abs().max()) < 0.5
    with pytest.raises(CheckpointError, match="not finite"):
        kmeans.cluster(weight / 0, keep, 15)
