"""The optimal brain surgeon against brute force: every removal by least squares, one after the other."""

from __future__ import annotations

import pytest
import torch

from prune_cli.reconstruction import surgeon
from prune_cli.reconstruction.least_squares import refit
from prune_cli.reconstruction.surgeon import removal_losses

TINY = 1e-12


def problem(rows: int = 4, k: int = 7, seed: int = 0):
    torch.manual_seed(seed)
    x = torch.randn(k, k, dtype=torch.float64) @ torch.randn(k, 40, dtype=torch.float64)
    weight = torch.randn(rows, k, dtype=torch.float64)
    return x, weight, torch.zeros(rows, k, dtype=torch.bool)


def error(x, row, keep) -> float:
    """The least squared error with what is kept."""
    columns = keep.nonzero()[:, 0]
    if not len(columns):
        return float((row @ x).square().sum())
    fit = torch.linalg.lstsq(x[columns].T, row @ x).solution
    return float((fit @ x[columns] - row @ x).square().sum())


def greedy(x, row, allowed=lambda keep, which: True) -> tuple[list[int], list[float]]:
    """The order in which weights go when each time the one goes that costs least, and twice what each adds."""
    keep, gone, added = torch.ones(len(row), dtype=torch.bool), [], []
    while True:
        now, trials = error(x, row, keep), {}
        for which in keep.nonzero()[:, 0].tolist():
            without = keep.clone()
            without[which] = False
            if allowed(keep, which):
                trials[which] = error(x, row, without)
        if not trials:
            return gone, added
        best = min(trials, key=trials.__getitem__)
        gone.append(best)
        added.append(2 * (trials[best] - now))  # the Hessian is twice the gram
        keep[best] = False


def test_weights_go_in_the_order_of_brute_force_and_cost_what_the_refit_says():
    x, weight, gone = problem()
    losses = removal_losses(weight, x @ x.T, damping=TINY, gone=gone, blocks=None, most=0)
    for row in range(len(weight)):
        order, added = greedy(x, weight[row])
        wanted = torch.empty_like(weight[row])
        dearest = 0.0
        for which, cost in zip(order, added, strict=True):
            dearest = max(dearest, cost)
            wanted[which] = dearest
        torch.testing.assert_close(losses[row], wanted, rtol=1e-4, atol=1e-6)


def test_the_lowest_of_a_layer_are_what_taking_the_cheapest_next_weight_of_all_rows_takes():
    x, weight, gone = problem(seed=3)
    losses = removal_losses(weight, x @ x.T, damping=TINY, gone=gone, blocks=None, most=0)
    queues = [list(zip(*greedy(x, row), strict=True)) for row in weight]
    taken = set()
    for _ in range(14):
        row = min((r for r in range(len(weight)) if queues[r]), key=lambda r: queues[r][0][1])
        taken.add((row, queues[row].pop(0)[0]))
    lowest = losses.flatten().argsort()[:14]
    assert {(int(i) // weight.shape[1], int(i) % weight.shape[1]) for i in lowest} == taken


@pytest.mark.parametrize(("m", "most"), [(2, 1), (4, 2), (4, 3)])
def test_blocks_lose_no_more_than_they_may_in_the_order_of_brute_force(m, most):
    x, weight, gone = problem(k=10)
    blocks = torch.arange(10) // m
    losses = removal_losses(weight, x @ x.T, damping=TINY, gone=gone, blocks=blocks, most=most)
    for row in range(len(weight)):
        order, _ = greedy(x, weight[row], lambda keep, which: int((~keep)[blocks == blocks[which]].sum()) < most)
        assert set((losses[row] < float("inf")).nonzero()[:, 0].tolist()) == set(order)


def test_what_is_gone_goes_first_and_the_rest_makes_up_for_it():
    x, weight, gone = problem(k=8)
    gone[:, 2] = True
    left = weight * ~gone
    losses = removal_losses(left, x @ x.T, damping=TINY, gone=gone, blocks=None, most=0)
    assert (losses[gone] == -float("inf")).all()
    keep = ~gone[0]
    inside = removal_losses(
        left[:, keep], (x @ x.T)[keep][:, keep], damping=TINY, gone=gone[:, keep], blocks=None, most=0
    )
    torch.testing.assert_close(losses[:, keep], inside, rtol=1e-6, atol=1e-9)


def test_rows_that_do_not_fit_into_memory_together_give_the_same(monkeypatch):
    x, weight, gone = problem()
    whole = removal_losses(weight, x @ x.T, damping=0.01, gone=gone, blocks=None, most=0)
    monkeypatch.setattr(surgeon, "BYTES", 1)
    assert torch.equal(removal_losses(weight, x @ x.T, damping=0.01, gone=gone, blocks=None, most=0), whole)


def test_after_the_refit_it_is_nearer_to_the_layer_than_magnitudes_with_the_refit():
    better = 0
    for seed in range(10):
        x, weight, gone = problem(rows=6, k=16, seed=seed)
        gram = x @ x.T
        found = removal_losses(weight, gram, damping=TINY, gone=gone, blocks=None, most=0)
        errors = []
        for scores in (found, weight.abs()):
            keep = torch.ones_like(gone).flatten()
            keep[scores.flatten().argsort()[:64]] = False
            fitted = refit(weight, keep.view_as(gone), gram, weight @ gram, damping=0.0)
            errors.append(float(((fitted - weight) @ x).square().sum()))
        better += errors[0] < errors[1]
    assert better == 10
