"""Criteria of activations, against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prune_cli.criteria import activations
from prune_cli.criteria.criterion import LayerView
from prune_cli.criteria.statistics import collect


def score(model: nn.Module, name: str, criterion, need: str, batches, **arguments) -> Tensor:
    pairs = [(images, torch.zeros(len(images))) for images in batches]
    found = collect(model.eval(), pairs, (need,), None, batches[0][:1], **arguments)
    weight = model.get_parameter(name).detach()
    return criterion(LayerView(name, weight, None, torch.Generator(), found[name]))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 3, stride=2, padding=1))
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].bias.normal_()
    return model.eval()


def test_apoz_by_counting():
    model, batches = network(), list(torch.randn(7, 2, 6, 6).split(3))
    with torch.no_grad():
        hidden = torch.cat([model[:3](images) for images in batches])
        own = torch.cat([model[0](images) for images in batches]).relu()
    for at, maps in [("post_act", hidden), ("pre_norm", own)]:
        zeros = [sum(value == 0 for value in maps[:, c].flatten().tolist()) for c in range(5)]
        expected = [1 - count / (7 * 16) for count in zeros]
        assert score(model, "0.weight", activations.apoz, "not_positive", batches, at=at).tolist() == pytest.approx(
            expected
        )


def test_mean_activation_of_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    images = torch.randn(9, 4)
    with torch.no_grad():
        expected = model[:2](images).mean(0)
    got = score(model, "0.weight", activations.mean_activation, "mean", list(images.split(4)))
    assert torch.allclose(got, expected.double(), atol=1e-7)


def test_hrank_of_maps_of_known_rank():
    rows, columns = torch.rand(6, 4, 5, 6).unbind(0)[:2], torch.rand(6, 4, 6, 5).unbind(0)[:2]
    maps = []
    for left, right in zip(rows, columns, strict=True):  # channel r is a sum of r products of a column and a row
        maps.append(torch.stack([sum((torch.outer(left[r, :, i], right[r, i]) for i in range(r)), torch.zeros(5, 5))
                                 for r in range(4)]))  # fmt: skip
    images = torch.stack(maps)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4).view(4, 4, 1, 1))
    assert score(model, "0.weight", activations.hrank, "rank", [images[:1], images[1:]]).tolist() == [0, 1, 2, 3]


def test_hrank_does_not_depend_on_how_many_maps_are_ranked_at_a_time(monkeypatch):
    model, images = network(), torch.randn(4, 2, 8, 8)
    whole = score(model, "0.weight", activations.hrank, "rank", [images])
    monkeypatch.setattr("prune_cli.criteria.needs.RANK_ELEMENTS", 50)
    assert torch.equal(whole, score(model, "0.weight", activations.hrank, "rank", [images]))
    with torch.no_grad():
        expected = torch.linalg.matrix_rank(model[:3](images)).double().mean(0)
    assert torch.allclose(whole, expected)


def test_rank_where_there_is_no_map():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1.0, 0.0, -2.0])))
    images = torch.tensor([[1.0, 1.0, 1.0], [0.0, 5.0, 1.0]])
    assert score(model, "0.weight", activations.hrank, "rank", [images]).tolist() == [0.5, 0, 1]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, groups=2, padding=1),
        nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"),
    ],
    ids=["plain", "strides", "groups", "depthwise"],
)
def test_wanda_by_unfolding(layer):
    torch.manual_seed(0)
    images = torch.randn(5, 4, 9, 8)
    padded = images
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "padding": layer.padding}
    if layer.padding == "same":
        padded, geometry["padding"] = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect"), 0
    patches = nn.functional.unfold(padded, layer.kernel_size, **geometry)  # (n, in * kernel, positions)
    norms = patches.square().sum((0, 2)).sqrt().view(4, *layer.kernel_size)
    per_group = layer.in_channels // layer.groups
    expected = torch.empty_like(layer.weight)
    for out in range(layer.out_channels):
        group = out // (layer.out_channels // layer.groups)
        expected[out] = layer.weight[out].abs() * norms[group * per_group : (group + 1) * per_group]
    got = score(nn.Sequential(layer), "0.weight", activations.wanda, "input_norm", list(images.split(2)))
    assert got.shape == layer.weight.shape
    assert torch.allclose(got.float(), expected, rtol=1e-5)


def test_wanda_of_linear_layers_with_and_without_positions():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    for images in (torch.randn(6, 4), torch.randn(6, 5, 4)):
        got = score(nn.Sequential(layer), "0.weight", activations.wanda, "input_norm", list(images.split(4)))
        expected = layer.weight.abs() * images.flatten(0, -2).norm(dim=0)
        assert torch.allclose(got.float(), expected, rtol=1e-5)


@pytest.mark.parametrize(("stride", "padding", "kernel"), [(1, 0, 3), (2, 1, 3), (3, 2, 4), (1, 3, 2), (2, 2, 3)])
def test_wanda_of_transposed_convolutions_counts_only_inputs_that_are_not_cut_off(stride, padding, kernel):
    """The output's dependence on a weight is linear in the input: squared sensitivities summed are squared norms."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(2, 3, kernel, stride=stride, padding=padding, dilation=1, bias=False).double()
    image = torch.randn(1, 2, 8, 7, dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(
        lambda weight: nn.functional.conv_transpose2d(image, weight, None, layer.stride, layer.padding), layer.weight
    )
    expected = layer.weight.abs() * jacobian.square().flatten(0, 3).sum(0).sqrt()
    got = score(nn.Sequential(layer), "0.weight", activations.wanda, "input_norm", [image])
    assert torch.allclose(got, expected)
