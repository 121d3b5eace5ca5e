"""Criteria that need nothing but the weights and the norms behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from prune_cli.criteria.criterion import LayerView, Nature


@Nature(power=1)
def l1(view: LayerView) -> Tensor:
    """|w|; summed over a filter it is the filter's L1 norm (Li et al., arXiv:1608.08710, section 3.1)."""
    return view.weight.abs()


@Nature(power=2)
def l2(view: LayerView) -> Tensor:
    """w ** 2; summed over a filter it is the square of the filter's L2 norm, which ranks filters as the norm does."""
    return view.weight.square()


@Nature(drawn=True)
def random(view: LayerView) -> Tensor:
    """Uniform numbers from the layer's own generator, one per unit whatever its size: the control arm of every table."""
    return torch.rand(view.weight.shape, generator=view.generator).to(view.weight.device)


def fpgm(view: LayerView) -> Tensor:
    """Sum of the distances to all filters of the layer (He et al., arXiv:1811.00250, eq. 6): (channels,).

    The filter nearest the geometric median is the one that the others replace best, and ranks lowest.
    """
    filters = view.filters.double() if view.weight.device.type != "mps" else view.filters
    return torch.cdist(filters, filters).sum(1)


@Nature(power=1)
def bn_scale(view: LayerView) -> Tensor:
    """|scale| of the norm that follows (Liu et al., arXiv:1708.06519, section 3); 0 where there is none: (channels,)."""
    if view.norm is None or view.norm.scale is None:
        return view.weight.new_zeros(view.weight.shape[view.axis])
    return view.norm.scale.abs()
