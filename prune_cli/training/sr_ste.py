"""N:M training from dense weights with a mask that follows them: SR-STE (Zhou et al., arXiv:2102.04010, section 3.2).

Every forward pass uses the N:M projection of the weights. Its gradient goes straight through to all of them, and what
is masked at the moment decays: w <- w - lr * (dL/dw~ + decay * (1 - mask) * w), which makes masks settle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune_cli.granularities.n_m import input_axis, nm_mask
from prune_cli.structure.prunable import target


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return gradients[0].addcmul(weight, (~mask).to(weight.dtype), value=ctx.decay), None, None


class SrSte(nn.Module):
    """A parametrisation: dense weight -> its N:M projection, with the gradient of SR-STE.

    Args:
        m: consecutive input channels per group.
        n: entries kept of each group, by magnitude.
        axis: of the input channels.
        decay: pull of masked weights towards zero, 2e-4 in the paper.
    """

    def __init__(self, m: int, n: int, axis: int, decay: float) -> None:
        super().__init__()
        self.m, self.n, self.axis, self.decay = m, n, axis, decay

    def mask(self, weight: Tensor) -> Tensor:
        """The projection's mask, True = keep."""
        return nm_mask(weight.detach().abs(), self.m, self.n, self.axis)

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.mask(weight), self.decay)  # type: ignore[no-any-return]


def attach(model: nn.Module, patterns: Mapping[str, tuple[int, int]], decay: float) -> None:
    """Lets a network compute with N:M weights, in place; `detach` ends it.

    Args:
        patterns: (m, n) by name of the weight.
        decay: see `SrSte`.
    """
    for name, (m, n) in patterns.items():
        axis = input_axis(model, name)
        parametrize.register_parametrization(
            target(model, name).module, "weight", SrSte(m, n, axis, decay), unsafe=True
        )


def detach(model: nn.Module, patterns: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Leaves the N:M weights as plain parameters of the old names, and returns their masks."""
    masks = {}
    for name in patterns:
        module: Any = target(model, name).module
        masks[name] = module.parametrizations.weight[0].mask(module.parametrizations.weight.original)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return masks
