"""Which units change places: some that stay are dropped, and as many grow (arXiv:1707.04780, arXiv:1911.11134). Pure."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(kept: Tensor, drop: Tensor, grow: Tensor, fraction: float, rows: Tensor | None = None) -> Tensor:
    """Which units of a group stay after some have changed places, as many as before: (n,) bool.

    Of k units that stay, floor(fraction * k) with the lowest `drop` go. As many of those that are masked then grow, with
    the highest `grow`: one that has just been dropped may be among them, and stays. Ties go by index.

    Args:
        kept: (n,) bool, True = stays now.
        drop: (n,), the lowest is dropped first.
        grow: (n,), the highest grows first; -inf = never.
        fraction: in [0, 1].
        rows: (rows, n / rows): the units of every row, inside which they change places; None = the whole group is one.
    """
    places = torch.arange(kept.numel(), device=kept.device).view(1, -1) if rows is None else rows.to(kept.device)
    alive = kept.flatten()[places]
    count = (fraction * alive.sum(1, keepdim=True).double()).floor()
    gone = alive & (_rank(drop.flatten()[places].masked_fill(~alive, float("inf"))) < count)
    survives = alive & ~gone
    back = _rank(-grow.flatten()[places].masked_fill(survives, float("-inf"))) < count
    found = torch.empty_like(kept.flatten())
    found[places] = survives | back
    return found


def _rank(values: Tensor) -> Tensor:
    """The place of every entry among those of its row, the lowest first."""
    order = values.argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(values.shape[1], device=values.device).expand_as(order)
    )
