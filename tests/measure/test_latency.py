"""Latency: measured without a trace on the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prune_cli.measure.latency import latency


# ------------------------------------------------------------------------------------------------- latency
def test_latency_restores_threads_and_leaves_the_model() -> None:
    model = nn.Linear(4, 4)
    threads = torch.get_num_threads()
    result = latency(model, torch.randn(8, 4), dtype=torch.bfloat16, threads=1, warmup=1, repeats=9)
    assert 0 < result.median_ms <= result.p95_ms
    assert result.throughput == pytest.approx(8e3 / result.median_ms)
    assert (result.batch_size, result.device, result.dtype, result.repeats) == (8, "cpu", "bfloat16", 9)
    assert torch.get_num_threads() == threads
    assert model.training and model.weight.dtype == torch.float32
