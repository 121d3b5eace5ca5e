"""Weights that give a layer's outputs again as nearly as those that are left can: least squares on moments.

A layer is a set of rows that each multiply a column of `k` inputs. All that is needed of the images are two sums over
columns x: `gram` = sum of x x^T, and `cross` = sum of y x^T for the outputs y that are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 2e10  # multiply-adds of Cholesky factors up to which every set of inputs is solved by itself
TOLERANCE, ITERATIONS = 1e-8, 1000  # of conjugate gradients: norm of the residual over that of the right side


def refit(weight: Tensor, keep: Tensor, gram: Tensor, cross: Tensor, *, damping: float) -> Tensor:
    """Rows w, zero where nothing is kept, that minimise |w X - Y|^2 + ridge |w - weight|^2.

    The ridge pulls towards the weights that are there, so that inputs which the images never show leave them alone.

    Args:
        weight: (rows, k).
        keep: (rows, k), True where a weight stays.
        gram: (k, k), sum of x x^T.
        cross: (rows, k), sum of y x^T.
        damping: ridge, as a fraction of the mean of the gram's diagonal.

    Returns:
        (rows, k) in float64.
    """
    gram, cross = gram.double(), cross.double()
    start = weight.double() * keep
    ridge = damping * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    system = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # What was removed is missing from the start, and the ridge pulls what stays towards the weights as they were.
    right = (cross - start @ gram) * keep
    patterns, which = torch.unique(keep, dim=0, return_inverse=True)
    if float((patterns.sum(1).double() ** 3).sum()) > EXACT:
        return start + _conjugate_gradients(system, right, keep)
    change = torch.zeros_like(right)
    for number, pattern in enumerate(patterns):
        rows, columns = (which == number).nonzero()[:, 0], pattern.nonzero()[:, 0]
        if len(columns):
            factor = torch.linalg.cholesky(system[columns][:, columns])
            found = torch.cholesky_solve(right[rows][:, columns].T, factor).T
            change[rows.unsqueeze(1), columns] = found
    return start + change


def _conjugate_gradients(system: Tensor, right: Tensor, keep: Tensor) -> Tensor:
    """All rows at once, each in the space of its own kept weights; preconditioned by the diagonal."""
    diagonal = system.diagonal()
    found, residual = torch.zeros_like(right), right.clone()
    scaled = residual / diagonal
    direction, slope = scaled.clone(), (residual * scaled).sum(1)
    goal = TOLERANCE * right.norm(dim=1)
    for _ in range(ITERATIONS):
        if bool((residual.norm(dim=1) <= goal).all()):
            break
        image = (direction @ system) * keep
        curvature = (direction * image).sum(1)
        step = torch.where(curvature > 0, slope / curvature.clamp_min(1e-300), 0.0).unsqueeze(1)
        found += step * direction
        residual -= step * image
        scaled = residual / diagonal
        after = (residual * scaled).sum(1)
        direction = scaled + torch.where(slope > 0, after / slope.clamp_min(1e-300), 0.0).unsqueeze(1) * direction
        slope = after
    return found
