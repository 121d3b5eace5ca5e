"""What a row of results.csv says."""

from __future__ import annotations

import pytest

from prune_cli.pipeline.results import slower


@pytest.mark.parametrize(
    ("params", "latency", "flagged"), [(50, 1.2, True), (50, 1.01, False), (50, 0.9, False), (100, 1.2, None)]
)
def test_a_smaller_network_that_is_slower_is_flagged(params, latency, flagged):
    dense = {"params": 100, "latency_ms_b1": 1.0, "latency_ms_b64": 9.0}
    assert slower({"params": params, "latency_ms_b1": latency, "latency_ms_b64": 9.0}, dense) is flagged
    assert slower({"params": params, "latency_ms_b1": None, "latency_ms_b64": None}, dense) is None
