"""Least squares on moments equals least squares on the images, row by row."""

from __future__ import annotations

import pytest
import torch

from prune_cli.reconstruction import least_squares
from prune_cli.reconstruction.least_squares import refit


def problem(rows: int = 5, k: int = 12, n: int = 60, seed: int = 0):
    torch.manual_seed(seed)
    x = torch.randn(k, k, dtype=torch.float64) @ torch.randn(k, n, dtype=torch.float64)  # correlated inputs
    weight = torch.randn(rows, k, dtype=torch.float64)
    return x, weight, weight @ x, torch.rand(rows, k) < 0.5


@pytest.mark.parametrize("exact", [2e10, 0], ids=["factors", "conjugate gradients"])
def test_every_row_is_the_least_squares_fit_of_what_it_keeps(monkeypatch, exact):
    monkeypatch.setattr(least_squares, "EXACT", exact)
    x, weight, y, keep = problem()
    found = refit(weight, keep, x @ x.T, y @ x.T, damping=0.0)
    for row in range(len(weight)):
        columns = keep[row].nonzero()[:, 0]
        wanted = torch.linalg.lstsq(x[columns].T, y[row]).solution
        torch.testing.assert_close(found[row, columns], wanted, rtol=1e-5, atol=1e-6)
    assert not found[~keep].any()


def test_rows_of_one_pattern_are_solved_together_and_an_empty_row_stays_empty():
    x, weight, y, keep = problem()
    keep[:] = keep[0]
    keep[3] = False
    found = refit(weight, keep, x @ x.T, y @ x.T, damping=0.0)
    columns = keep[0].nonzero()[:, 0]
    torch.testing.assert_close(found[:3, columns], torch.linalg.lstsq(x[columns].T, y[:3].T).solution.T)
    assert not found[3].any()


def test_damping_pulls_towards_the_weights_that_are_there():
    x, weight, y, keep = problem()
    far = refit(weight, keep, x @ x.T, y @ x.T, damping=1e9)
    torch.testing.assert_close(far, weight * keep, rtol=1e-4, atol=1e-4)
    ridge = 0.3 * (x @ x.T).diagonal().mean()
    found = refit(weight, keep, x @ x.T, y @ x.T, damping=0.3)
    # The formula: the gradient of |w X - Y|^2 + ridge |w - w0|^2 is zero in what is kept.
    slope = (found @ x - y) @ x.T + ridge * (found - weight * keep)
    assert slope[keep].abs().max() < 1e-8 * (y @ x.T).abs().max()


def test_inputs_that_are_never_seen_leave_their_weights_alone():
    x, weight, _, keep = problem()
    x[4] = 0.0
    keep[:, 4] = True
    found = refit(weight, keep, x @ x.T, (weight @ x) @ x.T, damping=0.01)
    torch.testing.assert_close(found[:, 4], weight[:, 4])
