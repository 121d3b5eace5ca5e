"""Networks in which layers are replaced by others of the same function, and back."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError, nearest
from prune_cli.layers.stripe_conv import StripeConv2d
from prune_cli.masks import Masks

# ---------------------------------------------------------------------------------------------- networks

Stripes = Mapping[str, Sequence[int]]
"""Module name -> increasing numbers n * K * K + position of the stripes that a convolution has."""


def fitting(model: nn.Module, masks: Masks) -> dict[str, tuple[int, ...]]:
    """The stripes with anything left of every convolution that lost some, and that single stripes may replace.

    Convolutions of other classes, with hooks, or with a weight that other modules have too, are left out.

    Args:
        model: a network.
        masks: parameter name -> bool tensor, True = keep, broadcastable.
    """
    owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        mask = masks.get(f"{name}.weight")
        if type(module) is not nn.Conv2d or mask is None or not name:
            continue
        if owners[id(module.weight)] > 1 or _hooked(module):
            continue
        alive = mask.expand(module.weight.shape).any(1)
        if not alive.all():
            found[name] = tuple(torch.nonzero(alive.flatten()).flatten().tolist())
    return found


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def place(model: nn.Module, stripes: Stripes) -> None:
    """Replaces convolutions by their stripes, in place, under all names that a convolution has.

    Raises:
        SurgeryError: no such convolution, or numbers that it does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, numbers in stripes.items():
        conv = modules.get(name)
        if type(conv) is not nn.Conv2d or not name:
            raise SurgeryError(
                f"the network has no convolution {name!r} that could hold stripes{nearest(name, modules)}"
            )
        total = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        ordered = all(a < b for a, b in pairwise(numbers))
        if not ordered or (numbers and not 0 <= numbers[0] <= numbers[-1] < total):
            raise SurgeryError(f"stripes of {name!r} are not increasing numbers below {total}")
        keep = torch.zeros(total, dtype=torch.bool)
        keep[torch.tensor(numbers, dtype=torch.long)] = True
        small = StripeConv2d(conv, keep.view(conv.out_channels, *conv.kernel_size)).train(conv.training)
        _exchange(model, {conv: small})


def expanded(model: nn.Module, masks: Masks) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network with plain convolutions in place of stripes, and the masks under which it is the same function.

    Args:
        model: left as it was.
        masks: parameter name -> bool tensor, True = keep, of `model`.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, StripeConv2d)}
    whole = dict(masks)
    for name, layer in found.items():
        inside = masks.get(f"{name}.weight")
        whole[f"{name}.weight"] = layer.spread(inside)
    twin = copy.deepcopy(model)
    _exchange(twin, {module: module.dense() for module in twin.modules() if isinstance(module, StripeConv2d)})
    return twin, whole


def _exchange(model: nn.Module, twins: Mapping[Any, nn.Module]) -> None:
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module in twins:
                setattr(parent, child, twins[module])
