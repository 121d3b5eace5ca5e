"""Masks during training: pruned weights stay zero, in the weights and in what the optimizer remembers of them.

Masking gradients only is not enough: momentum keeps moving a pruned weight for many steps. `Enforcer` multiplies
weights and moments after every optimizer step in one fused call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

Masks = Mapping[str, Tensor]
"""Parameter name -> bool tensor, broadcastable to the parameter; True = keep."""


def apply(model: nn.Module, masks: Masks) -> None:
    """Zeroes the masked entries of a model's parameters in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask.to(parameters[name].device))


def joined(first: Masks, second: Masks) -> dict[str, Tensor]:
    """Masks that remove what either removes."""
    both = {**first, **second}
    return {
        name: first[name] & second[name].to(first[name].device) if name in first and name in second else mask
        for name, mask in both.items()
    }


def sliced(mask: Tensor, kept: Mapping[int, Sequence[int]]) -> Tensor:
    """The mask of a parameter of which only some positions are left; axes that it spreads over stay spread.

    Args:
        mask: with as many axes as the parameter.
        kept: axis -> positions that are left.
    """
    for axis, indices in kept.items():
        if mask.shape[axis] > 1:
            mask = mask.index_select(axis, torch.tensor(indices, device=mask.device))
    return mask


class Enforcer:
    """Keeps masked entries of parameters and of optimizer moments at zero; call it after every optimizer step."""

    def __init__(self, model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer) -> None:
        parameters = dict(model.named_parameters())
        self._optimizer = optimizer
        self._pairs = [(parameters[name], _as_factor(mask, parameters[name])) for name, mask in masks.items()]
        self._targets: list[Tensor] = []
        self._factors: list[Tensor] = []

    @torch.no_grad()
    def __call__(self) -> None:
        if not self._pairs:
            return
        moments = self._collect()
        if len(self._targets) != moments:  # moments appear with the first step, then stay the same tensors
            self._targets, self._factors = [], []
            for parameter, factor in self._pairs:
                self._targets.append(parameter)
                self._factors.append(factor)
                for moment in self._moments(parameter):
                    self._targets.append(moment)
                    self._factors.append(factor)
        torch._foreach_mul_(self._targets, self._factors)

    def _collect(self) -> int:
        return sum(1 + len(self._moments(parameter)) for parameter, _ in self._pairs)

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        state = self._optimizer.state.get(parameter, {})
        return [state[name] for name in MOMENTS if torch.is_tensor(state.get(name))]


def _as_factor(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask in the parameter's type and layout: a plain product is then one pass without conversion."""
    full = mask.to(parameter.device).expand(parameter.shape).to(parameter.dtype)
    return torch.empty_like(parameter).copy_(full)


def zeros(masks: Masks, model: nn.Module) -> int:
    """How many parameter entries the masks remove."""
    parameters = dict(model.named_parameters())
    return sum(
        parameters[name].numel() - int(mask.sum()) * (parameters[name].numel() // mask.numel())
        for name, mask in masks.items()
    )
