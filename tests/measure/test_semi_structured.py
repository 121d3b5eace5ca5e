"""2:4 layers: which ones the check finds, and what it says of devices and layers that have no kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.measure import semi_structured

CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= semi_structured.AMPERE


def keep_first(shape, n, m):
    """A mask that keeps the first n of every m inputs."""
    return (torch.arange(shape[1]) % m < n).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)


@pytest.mark.parametrize(
    ("shape", "n", "m", "expected"),
    [((8, 16), 2, 4, True), ((8, 16), 1, 4, True), ((8, 16), 3, 4, False), ((8, 16, 3, 3), 2, 4, True),
     ((8, 6), 2, 4, True), ((8, 7), 3, 4, False), ((8, 16), 4, 8, False), ((8, 16), 1, 8, True)],
)  # fmt: skip
def test_two_of_four(shape, n, m, expected):
    assert semi_structured.two_of_four(keep_first(shape, n, m)) is expected


def test_a_bias_is_no_matrix():
    assert not semi_structured.two_of_four(torch.zeros(8, dtype=torch.bool))


class Twice(nn.Module):
    """Runs a layer two times, on different inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 64, 1), nn.Linear(64, 64)

    def forward(self, x):
        return self.head(self.head(self.conv(x).mean((2, 3))))


def masked():
    model = Twice().eval()
    masks = {f"{name}.weight": keep_first(model.get_submodule(name).weight.shape, 2, 4) for name in ("conv", "head")}
    for name, mask in masks.items():
        model.get_parameter(name).data *= mask
    return model, masks


def test_reasons_on_a_device_without_sparse_tensor_cores():
    model, masks = masked()
    found = semi_structured.timings(model, masks, torch.randn(2, 4, 5, 5))
    assert "linear layers only" in found["conv"].semi_structured
    assert "compute capability 8.0 or more, ran on cpu" in found["head"].semi_structured
    assert found["head"].latency_semi_structured_ms is None
    dense = {name: torch.ones_like(mask) for name, mask in masks.items()}
    assert semi_structured.timings(model, dense, torch.randn(2, 4, 5, 5)) == {}


def test_watching_the_inputs_changes_no_result():
    model, _ = masked()
    images = torch.randn(2, 4, 5, 5)
    before = model(images)
    inputs = semi_structured._inputs(model, ["head"], images)
    assert torch.equal(inputs["head"], model.conv(images).mean((2, 3)))
    assert torch.equal(model(images), before)
    assert not model.head._forward_pre_hooks


@pytest.mark.skipif(not CUDA, reason="needs an Ampere GPU")
def test_conversion_computes_the_same():
    model, masks = masked()
    model.cuda()
    found = semi_structured.timings(model, masks, torch.randn(64, 4, 5, 5, device="cuda"))["head"]
    assert found.semi_structured == "converted" and found.semi_structured_error < 1e-2
    assert found.latency_half_ms > 0 and found.latency_semi_structured_ms > 0
