"""Movement of weights, summed up while a stage trains (Sanh et al., arXiv:2005.07683)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from prune_cli.criteria.criterion import Need

PREFIX = "movement/"


class Movement:
    """Sums -lr * g * w of every weight while the network trains; for `fit(regularise=...)`, changes no gradient.

    The gradient is that of the loss at the weights as they are. Where masks are soft, a masked weight starts at zero
    and regrows, instead of being held while its gradient goes straight through, as in the paper.

    Args:
        model: the network.
        names: weights of interest.
        rate: the present learning rate.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rate: Callable[[], float]) -> None:
        self._weights = {PREFIX + name: model.get_parameter(name) for name in names}
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
                memory[key].addcmul_(weight.grad, weight, value=-rate)


def moved(memory: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
    """What `Movement` summed of one weight."""
    return memory[PREFIX + name].to(device)


SUMMED: Mapping[Need, tuple[Callable[..., Movement], Callable[..., Tensor]]] = {"movement": (Movement, moved)}
"""Needs that are summed up while the prune stage trains: the hook that does it, and what it summed of one weight."""
