"""The store: what is in it is not computed again, what is damaged is, and what nobody refers to goes."""

from __future__ import annotations

import pandas
import pytest
import torch

from prune_cli.pipeline.store import Store
from tests.runs.test_cli import QUICK
from tests.runs.test_faults import sums


def test_second_run_takes_everything_from_the_store(prune):
    first, second = prune("run", *QUICK), prune("run", *QUICK)
    assert second.err.count("taken from the store") == 3
    assert second.rows.drop(columns=["seconds"]).equals(first.rows.drop(columns=["seconds"]))
    assert (first.folder / "finetune/weights.safetensors").read_bytes() == (
        second.folder / "finetune/weights.safetensors"
    ).read_bytes()


@pytest.mark.thorough
def test_sweep_trains_each_dense_network_once(prune, workplace):
    result = prune("run", "-m", *QUICK, "stages=[train,prune]", "criterion=l1,l2,random", "seed=0,1")
    assert result.code == 0, result.err
    assert result.err.count("train: starting") == 2
    assert result.err.count("prune: starting") == 6

    (table,) = workplace.glob("outputs/multirun/*/results.csv")
    assert len(pandas.read_csv(table)) == 12
    assert "8 stages" in prune("store").out


def test_latency_is_measured_also_for_what_comes_from_the_store(prune):
    assert prune("run", *QUICK).rows.latency_ms_b1.isna().all()
    again = prune("run", *QUICK[:-1], "latency=true")
    assert again.err.count("taken from the store") == 3
    assert (again.rows.latency_ms_b1 > 0).all()
    assert (again.rows.latency_p95_ms_b64 >= again.rows.latency_ms_b64).all()


def test_gc_keeps_what_runs_refer_to(prune, workplace):
    kept = prune("run", *QUICK)
    other = prune("run", *QUICK, "seed=1")
    import shutil

    shutil.rmtree(other.folder)
    assert "deleted 3 folders" in prune("store", "--gc").out
    assert "3 stages" in prune("store").out
    assert prune("run", *QUICK).err.count("taken from the store") == 3
    assert kept.folder.is_dir()


def test_one_altered_byte_in_the_store_is_found_and_computed_again(prune, workplace):
    first = prune("run", *QUICK)
    before = sums(first.folder)
    victims = sorted(workplace.glob("outputs/store/*/weights.safetensors"))
    for victim in victims:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    second = prune("run", *QUICK)
    assert second.code == 0
    assert second.err.count("is damaged") == 3
    assert second.err.count(": starting") == 3
    assert sums(second.folder) == before


def test_a_damaged_unfinished_checkpoint_is_ignored(workplace):
    slot = Store(workplace).slot("k")
    slot.save({"a": torch.ones(3)}, {"n": 1})
    tensors, numbers = slot.load()
    assert tensors["a"].tolist() == [1, 1, 1]
    assert numbers == {"n": 1}
    (path,) = workplace.glob("k.partial/*/weights.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert slot.load() is None
    assert slot.load() is None


def test_a_store_that_cannot_be_made(prune, workplace, monkeypatch):
    (workplace / "file").write_text("")
    monkeypatch.setenv("PRUNE_STORE", str(workplace / "file/store"))
    result = prune("run", *QUICK)
    assert result.code == 6, result.err
    assert "PRUNE_STORE" in result.err.strip().splitlines()[-1]
