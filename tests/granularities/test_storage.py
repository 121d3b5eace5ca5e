"""Bytes of formats by hand-computed numbers."""

from __future__ import annotations

import torch

from prune_cli.granularities import storage


def test_dense_and_filters():
    assert storage.dense((4, 3, 3, 3)).total == 4 * 27 * 4
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    mask[0], mask[:, 1] = False, False
    cost = storage.filters(mask, (4, 3, 3, 3))
    assert (cost.values, cost.bitmaps) == (3 * 2 * 9 * 4, 1)


def test_fillers_cover_every_zero_that_codes_do_not():
    mask = torch.zeros(50, dtype=torch.bool)
    mask[[3, 20, 21]] = True
    # runs of 3, 16, 0 and 28 zeros; a filler of 2 bits covers 4, of 4 bits 16
    assert storage.fillers(mask, 2) == 0 + 4 + 0 + 7
    assert storage.fillers(mask, 4) == 0 + 1 + 0 + 1
    assert storage.fillers(torch.zeros(16, dtype=torch.bool), 4) == 1
    assert storage.fillers(torch.ones(5, dtype=torch.bool), 4) == 0


def test_single_weights_take_the_cheapest_indices():
    full = torch.ones(100, 10, dtype=torch.bool)
    assert storage.element(full, full.shape) == storage.Storage(4000, bitmaps=125)
    sparse = torch.zeros(100, 100, dtype=torch.bool)
    sparse[:, 0] = True  # runs of 99 zeros: 8 bits need no filler, and one bit each is dearer
    assert storage.element(sparse, sparse.shape) == storage.Storage(400, indices=100)
