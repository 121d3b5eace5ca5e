"""The hash of a state."""

from __future__ import annotations

import torch

from prune_cli.tensors import state_sha256


def test_state_hash_sees_values_names_types_and_sizes_only() -> None:
    x = torch.arange(6.0).view(2, 3)
    digest = state_sha256({"x": x, "y": x + 1})
    assert state_sha256({"y": x + 1, "x": x.t().contiguous().t()}) == digest
    different = [
        {"x": x, "y": x + 2},
        {"x": x, "z": x + 1},
        {"x": x.view(3, 2), "y": x + 1},
        {"x": x.double(), "y": x + 1},
        {"x": x},
    ]
    assert len({digest, *map(state_sha256, different)}) == 6
