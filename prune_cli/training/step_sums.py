"""Statistics that are summed up step by step while a stage trains, such as movement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from prune_cli.criteria.needs import Need


class StepSum:
    """Sums what a need of source `training` says of every weight; for `fit(regularise=...)`, changes no gradient.

    The gradient is that of the loss at the weights as they are. Where masks are soft, a masked weight starts at zero
    and regrows, instead of being held while its gradient goes straight through, as in the paper of movement pruning.

    Args:
        need: its `take` adds a step to the sum.
        model: the network.
        names: weights of interest.
        rate: the present learning rate.
    """

    def __init__(self, need: Need, model: nn.Module, names: Sequence[str], rate: Callable[[], float]) -> None:
        assert need.source == "training" and need.take is not None
        self._add = need.take
        self._weights = {_key(need, name): model.get_parameter(name) for name in names}
        self._rate = rate

    @torch.no_grad()
    def __call__(self, step: int, memory: dict[str, Tensor]) -> None:
        rate = self._rate()
        for key, weight in self._weights.items():
            if key not in memory:
                memory[key] = torch.zeros_like(weight)
            elif memory[key].device != weight.device:  # from a checkpoint
                memory[key] = memory[key].to(weight.device)
            if weight.grad is not None:
                self._add(memory[key], weight, weight.grad, rate)


def summed(need: Need, memory: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
    """What `StepSum` summed of one weight."""
    return memory[_key(need, name)].to(device)


def _key(need: Need, name: str) -> str:
    return f"{need.name}/{name}"
