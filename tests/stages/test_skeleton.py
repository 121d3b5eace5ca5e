"""The skeleton stage: a strong penalty removes stripes, and refusals."""

from __future__ import annotations

import pandas
import pytest


def test_a_strong_penalty_removes_stripes_in_a_run(prune):
    result = prune(
        "run", "recipe=quickstart", "granularity=stripe", "stages=[skeleton]", "latency=false", "device=cpu",
        "skeleton.epochs=4", "skeleton.batch_size=64", "skeleton.optimizer.lr=0.05", "skeleton.alpha=0.03",
        "skeleton.threshold=0.5",
    )  # fmt: skip
    assert result.code == 0, result.err
    before, row = result.rows.loc["initial"], result.rows.loc["skeleton"]
    assert 0 < row.ratio_prunable < 1
    assert row.params == row.params_nonzero < before.params
    assert row.macs == row.macs_nonzero < before.macs
    assert row.compression == pytest.approx(before.params / row.params)
    assert pandas.isna(row.acc1_dense), "nobody trained the dense network"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("granularity=element",), "choose granularity=stripe"),
        (("granularity=stripe", "skeleton.threshold=1"), "begin at 1"),
        (("granularity=stripe", "skeleton.fit.ema=0.9"), "ema=null"),
        (("granularity=stripe", "model=lenet_300_100"), "the network has none"),
    ],
)
def test_refusals(prune, arguments, message):
    result = prune("run", "recipe=quickstart", "stages=[skeleton]", *arguments)
    assert result.code == 2 and message in result.err
