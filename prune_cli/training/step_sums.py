"""Statistics that are summed up step by step while a stage trains, such as movement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from prune_cli.criteria.needs import Need


class StepSum:
    """Sums what a need of source `training` says of every weight; for `fit(regularise=...)`, changes no gradient.

    The gradient is that of the loss at the weights as the forward pass sees them, also of those that a mask makes zero.
    A weight that keeps its value behind the mask counts with that value: so gradients go straight through masks (Sanh et
    al., arXiv:2005.07683, section 3.1).

    Args:
        need: its `take` adds a step to the sum.
        model: the network.
        names: weights of interest.
        rate: the present learning rate.
        hidden: parameter name -> what is behind its mask, 0 elsewhere.
        shrinkage: lambda of the penalty lambda * sum of sigmoid(S) on the sums S, which step down its gradient too.
    """

    def __init__(
        self,
        need: Need,
        model: nn.Module,
        names: Sequence[str],
        rate: Callable[[], float],
        *,
        hidden: Mapping[str, Tensor] = MappingProxyType({}),
        shrinkage: float = 0.0,
    ) -> None:
        assert need.source == "training" and need.take is not None
        self._add = need.take
        self._weights = {_key(need, name): model.get_parameter(name) for name in names}
        self._hidden = {_key(need, name): hidden[name] for name in names if name in hidden}
        self._rate, self._shrinkage = rate, shrinkage

    @torch.no_grad()
    def __call__(self, step: int, memory: dict[str, Tensor]) -> None:
        rate = self._rate()
        for key, weight in self._weights.items():
            if key not in memory:
                memory[key] = torch.zeros_like(weight)
            elif memory[key].device != weight.device:  # from a checkpoint
                memory[key] = memory[key].to(weight.device)
            if weight.grad is not None:
                whole = weight + self._hidden[key] if key in self._hidden else weight
                self._add(memory[key], whole, weight.grad, rate)
            if self._shrinkage:
                slope = memory[key].sigmoid()
                memory[key].sub_(slope * (1 - slope), alpha=rate * self._shrinkage)


def summed(need: Need, memory: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
    """What `StepSum` summed of one weight."""
    return memory[_key(need, name)].to(device)


def _key(need: Need, name: str) -> str:
    return f"{need.name}/{name}"
