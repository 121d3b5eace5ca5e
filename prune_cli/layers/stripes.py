"""The kind of replaced layer that consists of single stripes: `StripeConv2d` in place of a convolution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.layers.kind import Data, Expanded, Stored
from prune_cli.layers.stripe_conv import StripeConv2d
from prune_cli.masks import Masks
from prune_cli.ranges import indices_of, ranges


class Stripes:
    """Convolutions of the stripes that are left; `stripes` in the data are their numbers n * K * K + position."""

    closed = "single stripes"

    def build(self, dense: nn.Module, data: Data) -> StripeConv2d:
        """The stripes of a convolution; their weights are taken over."""
        if type(dense) is not nn.Conv2d:
            raise SurgeryError(f"a {type(dense).__name__} is no convolution that could hold stripes")
        total = dense.out_channels * math.prod(dense.kernel_size)
        numbers = indices_of(data["stripes"], total)
        if numbers and numbers[-1] >= total:
            raise SurgeryError(f"stripes are not increasing numbers below {total}")
        keep = torch.zeros(total, dtype=torch.bool)
        keep[torch.tensor(numbers, dtype=torch.long)] = True
        return StripeConv2d(dense, keep.view(dense.out_channels, *dense.kernel_size)).train(dense.training)

    def expand(self, layer: nn.Module, masks: Masks) -> Expanded:
        """The masked convolution, and what the stripes leave out of it as a mask."""
        assert isinstance(layer, StripeConv2d)
        return Expanded(layer.dense(), {**masks, "weight": layer.spread(masks.get("weight"))})

    def masks_left(self, layer: nn.Module, masks: Masks) -> dict[str, Tensor]:
        """The weight's mask by rows of stripes; the bias keeps its own."""
        assert isinstance(layer, StripeConv2d)
        left = dict(masks)
        if "weight" in left:
            whole = left["weight"].expand(layer.out_channels, layer.weight.shape[1], *layer.kernel_size)
            left["weight"] = layer.rows(whole)
        return left

    def out_width(self, layer: nn.Module) -> int:
        """Filters, also those without stripes."""
        assert isinstance(layer, StripeConv2d)
        return layer.out_channels

    def stored(self, layer: nn.Module) -> dict[str, Stored]:
        """One bit per stripe of the dense layer says as much as the numbers that the network computes with."""
        assert isinstance(layer, StripeConv2d)
        return {
            "weight": Stored("stripe"),
            "stripes": Stored("stripe", layer.out_channels * math.prod(layer.kernel_size)),
        }


def data_of(numbers: Sequence[int]) -> Data:
    """The data of a layer that is left with these stripes, increasing numbers n * K * K + position."""
    return {"stripes": ranges(numbers)}


def fitting(model: nn.Module, masks: Masks) -> dict[str, Data]:
    """The stripes with anything left of every convolution that lost some, and that single stripes may replace.

    Convolutions of other classes, with hooks, or with a weight that other modules have too, are left out.

    Args:
        model: a network.
        masks: parameter name -> bool tensor, True = keep, broadcastable.

    Returns:
        Module name -> data of its replacement.
    """
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    found: dict[str, Data] = {}
    for name, module in model.named_modules():
        mask = masks.get(f"{name}.weight")
        if type(module) is not nn.Conv2d or mask is None or not name:
            continue
        if owners[id(module.weight)] > 1 or _hooked(module):
            continue
        alive = mask.expand(module.weight.shape).any(1)
        if not alive.all():
            found[name] = data_of(torch.nonzero(alive.flatten()).flatten().tolist())
    return found


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
