"""Masks that say what surgery takes out."""

from __future__ import annotations

import torch

from prune_cli.structure.slicing import structured_masks
from tests.structure.test_surgery import network, plan_and_keep


def test_masks_zero_rows_columns_and_norm_parameters() -> None:
    model = network()
    plan, keep = plan_and_keep(model)
    masks = structured_masks(model, plan, keep)
    assert set(masks) == {
        "stem.weight",
        "norm.weight",
        "norm.bias",
        "body.weight",
        "body.bias",
        "head.weight",
    }
    assert masks["body.weight"].shape == (8, 8, 1, 1) and int(masks["body.weight"].sum()) == 16
    assert masks["head.weight"].shape == (1, 8) and masks["norm.bias"].dtype == torch.bool
