"""Multiply-adds: by hand, and half of what PyTorch counts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models as zoo

from prune_cli.measure.cost import cost


@pytest.mark.parametrize("in_shape", [(1, 3, 6, 6), (4, 3, 6, 6)])
def test_macs_grow_with_the_batch(in_shape: tuple[int, ...]) -> None:
    assert cost(nn.Conv2d(3, 2, 3), torch.zeros(in_shape)).macs == in_shape[0] * 2 * 16 * 27


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("vit_b_32", 64),
        ("swin_t", 64),
        ("swin_v2_t", 64),
        ("mobilenet_v2", 32),
        ("shufflenet_v2_x0_5", 32),
        ("convnext_tiny", 32),
        ("densenet121", 32),
        ("resnext50_32x4d", 32),
    ],
)
def test_macs_are_half_of_what_pytorch_counts(name: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    extra = {"image_size": side} if name.startswith("vit") else {}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = zoo.get_model(name, weights=None, **extra).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(2, 3, side, side, device="meta"))
    result = cost(model, torch.empty(2, 3, side, side, device="meta"))
    assert result.macs > 0 and result.flops == counter.get_total_flops()
    assert result.params == sum(p.numel() for p in model.parameters())


class Attention(nn.Module):
    """Attention by every road: module, functional, products and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mha(x, x, x, need_weights=False)[0]
        x = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        scores = torch.einsum("bld,bmd->blm", x, x)
        return torch.baddbmm(x, scores, x) @ self.table


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("road", ["shapes", "values"])
def test_attention(length: int, road: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention().eval()
    if road == "values":  # what the fallback does, where the path depends on values
        model.register_forward_pre_hook(lambda _, inputs: float(inputs[0].sum()) and None)
    x = torch.randn(3, length, 8)
    result = cost(model, x)
    square = 3 * length * length * 8
    macs = {layer.name: layer.macs for layer in result.layers}
    assert macs == {
        "": 4 * square + 3 * length * 8 * 4,  # attention (2), einsum, baddbmm, table
        "mha": 3 * length * 8 * 24 + 2 * square,
        "mha.out_proj": 3 * length * 64,
    }
    assert torch.backends.mha.get_fastpath_enabled()
