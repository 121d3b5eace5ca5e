"""The optimal brain surgeon, exactly, for the rows of one layer (OBC, Frantar and Alistarh, arXiv:2208.11580)."""

from __future__ import annotations

import torch
from torch import Tensor

BYTES = 1 << 28  # of inverse Hessians that are held at a time


def removal_losses(
    weight: Tensor, gram: Tensor, *, damping: float, gone: Tensor, blocks: Tensor | None, most: int
) -> Tensor:
    """What each weight costs when its row loses one weight after the other, the others making up for it (algorithm 1).

    Of every row the weight with the least w^2 / [H^-1]_pp goes, the others take w_p / [H^-1]_pp times the column p of
    H^-1, and H^-1 is reduced to what is left. A weight costs at least what those before it in its row did, so that the
    lowest of any number of rows are what taking the cheapest next weight of all rows would take (algorithm 2).

    Args:
        weight: (rows, k).
        gram: (k, k), half of the Hessian H = 2 X X^T, which is the same for every row.
        damping: added to the diagonal, as a fraction of its mean.
        gone: (rows, k), True where a weight is removed already.
        blocks: (k,) numbers of sets of weights of which each row loses `most` at most; None = all of a row may go.
        most: see `blocks`.

    Returns:
        (rows, k) in float64: -inf for those that were gone, inf for those that stay because their block is full.
    """
    hessian = 2 * gram.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    at_a_time = max(BYTES // (8 * inverse.numel()), 1)
    parts = zip(weight.double().split(at_a_time), gone.split(at_a_time), strict=True)
    return torch.cat([_row_losses(rows, inverse, away, blocks, most) for rows, away in parts])


def _row_losses(weight: Tensor, inverse: Tensor, gone: Tensor, blocks: Tensor | None, most: int) -> Tensor:
    rows, k = weight.shape
    weight, inverse = weight.clone(), inverse.expand(rows, k, k).clone()
    each = torch.arange(rows, device=weight.device)
    losses = torch.full_like(weight, float("inf"))
    left = torch.ones_like(gone)
    dearest = torch.zeros(rows, dtype=weight.dtype, device=weight.device)
    room = None
    if blocks is not None:
        room = torch.full((rows, int(blocks.max()) + 1), most, device=weight.device)
    for _ in range(k):
        diagonal = inverse.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float64).tiny)
        price = torch.where(gone, -float("inf"), weight**2 / diagonal)
        price = price.masked_fill(~left, float("inf"))
        if room is not None and blocks is not None:
            price = price.masked_fill((room <= 0)[:, blocks] & ~gone, float("inf"))
        cost, which = price.min(1)
        going = cost < float("inf")
        if not bool(going.any()):
            break
        column, pivot = inverse[each, :, which], diagonal[each, which]
        factor = torch.where(going, weight[each, which] / pivot, 0.0)
        weight -= factor.unsqueeze(1) * column
        weight[each, which] = torch.where(going, 0.0, weight[each, which])
        scale = torch.where(going, 1 / pivot, 0.0)
        inverse.baddbmm_((column * scale.unsqueeze(1)).unsqueeze(2), column.unsqueeze(1), alpha=-1)
        dearest = torch.where(going, torch.maximum(dearest, cost.clamp_min(0)), dearest)
        losses[each, which] = torch.where(going, torch.where(cost == -float("inf"), cost, dearest), losses[each, which])
        left[each, which] &= ~going
        if room is not None and blocks is not None:
            room[each, blocks[which]] -= going.long()
    return losses
