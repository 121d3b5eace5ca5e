"""The sr_ste stage beside others."""

from __future__ import annotations

import pytest

from tests.training.test_sr_ste import QUICK


def test_stages_run_after_each_other(prune):
    result = prune(
        "run",
        *QUICK,
        "stages=[train,permute,sr_ste,finetune]",
        "sr_ste.epochs=2",
        "sr_ste.batch_size=64",
        "finetune.epochs=1",
    )
    assert result.code == 0, result.err
    rows = result.rows
    assert rows.loc["permute", "acc1"] == pytest.approx(rows.loc["train", "acc1"], abs=0.3)
    assert rows.loc["sr_ste", "ratio_prunable"] == pytest.approx(0.5, abs=0.03)
    assert rows.loc["finetune", "sparsity"] == pytest.approx(rows.loc["sr_ste", "sparsity"])


def test_other_granularities_are_refused(prune):
    for stage in ("sr_ste", "permute"):
        result = prune("run", "recipe=quickstart", "granularity=element", f"stages=[train,{stage}]")
        assert result.code == 2 and "choose granularity=n_m" in result.err
    result = prune("run", *QUICK, "stages=[train,sr_ste]", "sr_ste.decay=-1")
    assert result.code == 2 and "2e-4" in result.err
    result = prune("run", *QUICK, "stages=[train,permute]", "permute.window=-1")
    assert result.code == 2 and "permute.window: input should be 0, 8 or 12" in result.err
