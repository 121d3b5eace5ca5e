"""Criteria that read weights: distances and norms by their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune_cli.criteria import weights
from prune_cli.criteria.clustering import clustering
from prune_cli.criteria.criterion import Criterion, LayerView, Norm
from prune_cli.granularities.filter import Filter
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select


def view(weight: torch.Tensor, **extra) -> LayerView:
    return LayerView("layer.weight", weight, None, torch.Generator(), **extra)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_fpgm_is_the_sum_of_distances():
    weight = draw(5, 3, 2, 2)
    expected = [sum(float((a - b).square().sum().sqrt()) for b in weight) for a in weight]
    assert weights.fpgm(view(weight)).tolist() == pytest.approx(expected, rel=1e-6)


@given(st.integers(3, 40), st.integers(0, 1000), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_fpgm_ranks_alike_under_scaling_and_in_any_order(count, seed, factor):
    weight = draw(count, 4, 3, 3, seed=seed)
    scores = weights.fpgm(view(weight))
    assert torch.allclose(weights.fpgm(view(weight * factor)), scores * factor, rtol=1e-5)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(weights.fpgm(view(weight[order])), scores[order], rtol=1e-6)


def test_fpgm_finds_duplicates_of_any_size_most_replaceable():
    weight = torch.nn.functional.normalize(draw(12, 30), dim=1)  # equal lengths: a norm cannot tell them apart
    weight[[3, 7, 9]] = weight[3].clone()
    assert set(weights.fpgm(view(weight)).argsort()[:3].tolist()) == {3, 7, 9}


def test_filters_of_a_transposed_convolution_lie_along_its_second_axis():
    weight = draw(6, 4, 3, 3)
    scores = weights.fpgm(view(weight, axis=1))
    assert torch.allclose(scores, weights.fpgm(view(weight.transpose(0, 1))))
    assert scores.shape == (4,)


def test_bn_scale_is_the_size_of_the_scale_and_nothing_without_one():
    weight = draw(3, 2)
    norm = Norm(torch.tensor([-2.0, 0.5, 1.0]), torch.zeros(3))
    assert weights.bn_scale(view(weight, norm=norm)).tolist() == [2.0, 0.5, 1.0]
    assert weights.bn_scale(view(weight)).tolist() == [0.0] * 3
    assert weights.bn_scale(view(weight, norm=Norm(None, None))).tolist() == [0.0] * 3


def test_bn_scale_reaches_the_choice_through_the_network():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.9, -0.1, 0.8, 0.2, -0.7, 0.3]))
    criterion = Criterion(weights.bn_scale, "channel", ("norm",))
    chosen = select(Granularity(Filter(), 0.5), criterion, model, torch.zeros(1, 3, 8, 8))
    kept = chosen.masks["0.weight"].expand(model[0].weight.shape).flatten(1).any(1)
    assert kept.tolist() == [True, False, True, False, True, False]


# ------------------------------------------------------------------------------------------------ clustering


def kept(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


@given(st.integers(2, 8), st.integers(0, 200), st.booleans())
@settings(max_examples=25, deadline=None)
def test_clustering_keeps_one_of_each_duplicated_pair(pairs, seed, cosine):
    originals = draw(pairs, 3, 3, 3, seed=seed)
    order = torch.randperm(2 * pairs, generator=torch.Generator().manual_seed(seed))
    origin = torch.arange(pairs).repeat(2)[order]
    scores = clustering(view(originals[origin], n_keep=pairs), cosine=cosine)
    assert sorted(origin[kept(scores, pairs)].tolist()) == list(range(pairs))
    assert int((scores == 2).sum()) == pairs


def test_clustering_keeps_all_of_all_and_is_deterministic():
    weight = draw(10, 2, 3, 3)
    assert clustering(view(weight, n_keep=10)).tolist() == [2.0] * 10
    first = clustering(view(weight, n_keep=4))
    torch.manual_seed(5)
    assert torch.equal(first, clustering(view(weight, n_keep=4)))
    assert int((first == 2).sum()) == 4
    assert (first[first != 2] < 1).all() and (first >= 0).all()


def test_clustering_keeps_the_filter_nearest_each_centroid():
    near = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.35, 0.0]])  # centroid 0.15
    far = torch.tensor([[9.0, 9.0], [9.0, 9.4], [9.0, 9.1]])  # centroid 9.1667
    scores = clustering(view(torch.cat([near, far]) + 1, n_keep=2))
    assert kept(scores, 2) == [1, 5]
    others = [0, 2, 3, 4]
    apart = torch.tensor([0.1, 0.25, 0.1, 0.3])
    assert scores[others].tolist() == pytest.approx((apart / (1 + apart)).tolist(), rel=1e-5)


def test_clustering_with_fewer_different_filters_than_clusters_and_with_dead_ones():
    weight = torch.zeros(8, 3)
    weight[2:5] = torch.tensor([1.0, 2.0, 3.0])
    weight[5] = torch.tensor([-1.0, 0.0, 0.0])
    scores = clustering(view(weight, n_keep=3))
    assert (scores[[0, 1, 6, 7]] == 0).all()
    assert int((scores == 2).sum()) == 2 and scores[5] == 2
    assert kept(clustering(view(weight, n_keep=4)), 4) == [2, 3, 4, 5]


def test_compacting_wide_filters_keeps_distances():
    from prune_cli.criteria.clustering import _compact

    points = draw(7, 50).double()
    compact = _compact(points)
    assert compact.shape == (7, 7)
    assert torch.allclose(torch.cdist(points, points), torch.cdist(compact, compact), atol=1e-10)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.relu().mean((2, 3)))


def test_clustering_is_told_how_many_filters_its_family_keeps():
    told = {}

    def score(view: LayerView) -> torch.Tensor:
        told[view.name] = view.n_keep
        return clustering(view)

    criterion = Criterion(score, "channel", ("n_keep",))
    torch.manual_seed(0)
    chosen = select(Granularity(Filter(), 0.5), criterion, Residual(), torch.zeros(1, 3, 8, 8))
    assert told == {"stem.weight": 4, "inner.weight": 3, "outer.weight": 4, "head.weight": 4}
    assert chosen.removed == 7
    select(Granularity(Filter(), 0.5, min_keep=0.9), criterion, Residual(), torch.zeros(1, 3, 8, 8), fraction=0.5)
    assert told["stem.weight"] == 7 and told["inner.weight"] == 5
