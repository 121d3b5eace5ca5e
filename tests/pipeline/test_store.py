"""The store: what is in it is not computed again, what is damaged is, and what nobody refers to goes."""

from __future__ import annotations

import json
import os
import shutil
import time

import pandas
import pytest
import torch

from prune_cli.errors import StorageError
from prune_cli.files.lines import Lines
from prune_cli.pipeline.store import Slot, Store
from tests.foreign import fetched, sign
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


def test_a_checkpoint_gives_every_name_back_also_of_one_tensor(tmp_path):
    """As the masks of a snapshot that was restored, regressors of a training that has ended, and tied weights."""
    one = torch.arange(6.0).view(2, 3)
    given = {"a": one, "b": one, "c": one.t(), "d": one[0], "e": torch.zeros(())}
    slot = Slot(tmp_path / "slot")
    slot.save(given, {"epoch": 1})
    found, numbers = slot.load()
    assert found.keys() == given.keys() and numbers == {"epoch": 1}
    assert all(torch.equal(found[name], value) for name, value in given.items())


def test_latency_is_measured_also_for_what_comes_from_the_store(prune):
    assert prune("run", *QUICK).rows.latency_ms_b1.isna().all()
    again = prune("run", *QUICK[:-1], "latency=true")
    assert again.err.count("taken from the store") == 3
    assert (again.rows.latency_ms_b1 > 0).all()
    assert (again.rows.latency_p95_ms_b64 >= again.rows.latency_ms_b64).all()


def test_gc_keeps_what_runs_refer_to(prune, workplace):
    kept = prune("run", *QUICK)
    other = prune("run", *QUICK, "seed=1")
    shutil.rmtree(other.folder)
    assert "deleted 0 folders" in prune("store", "--gc").out, "what is young stays"
    assert "would delete 3 folders" in prune("store", "--gc", "--hours", "0", "--dry-run").out
    assert "6 stages" in prune("store").out
    assert "deleted 3 folders" in prune("store", "--gc", "--hours", "0").out
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


TRAIN = (*QUICK, "stages=[train]")


def test_gc_elsewhere_keeps_what_another_project_refers_to(prune, workplace, monkeypatch):
    """Two projects with one store; copies, not links, as on another disk."""
    monkeypatch.setenv("PRUNE_STORE", str(workplace / "shared"))
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    for name in ("one", "two"):
        (workplace / name).mkdir()
    monkeypatch.chdir(workplace / "one")
    assert prune("run", *TRAIN).code == 0
    monkeypatch.chdir(workplace / "two")
    other = prune("run", *TRAIN, "seed=1")
    shutil.rmtree(workplace / "two" / other.folder)
    swept = prune("store", "--gc", "--hours", "0")
    assert swept.code == 0, swept.err
    assert "deleted 1 folders" in swept.out and "1 run folders refer to" in swept.out
    monkeypatch.chdir(workplace / "one")
    assert "train: taken from the store" in prune("run", *TRAIN).err


def test_gc_keeps_what_is_young_locked_or_linked_elsewhere(workplace):
    store = Store(workplace / "store")
    keys = [letter * 32 for letter in "abcdef"]
    for key in keys:
        shutil.copytree(fetched("filter", workplace) / "finetune", store.root / key)
        (store.root / key / "manifest.json").write_text(json.dumps({"key": key}))
        sign(store.root / key)
        os.utime(store.root / key, (0, 0))
    used, young, linked, damaged, locked, gone = keys
    os.utime(store.root / young)
    os.link(store.root / linked / "weights.safetensors", workplace / "elsewhere")
    (store.root / damaged / "weights.safetensors").write_bytes(b"")
    (store.root / f".{gone}.killed").mkdir()
    os.utime(store.root / f".{gone}.killed", (0, 0))
    os.utime(store.root / damaged, (0, 0))
    with store.lock(locked, "train"):
        leftovers = store.sweepable({used}, 3600)
        assert {one.path.name for one in leftovers} == {damaged, gone, f".{gone}.killed"}
        assert store.sweep(leftovers) == 3
    assert {path.name for path in store.entries()} == {used, young, linked, locked}


def test_gc_refuses_to_guess_what_a_damaged_table_refers_to(prune, workplace):
    run = prune("run", *TRAIN)
    (run.folder / "results.csv").write_bytes(b"key\n\xff\xfe")
    result = prune("store", "--gc", "--hours", "0")
    assert result.code == 4 and "results.csv is no text in UTF-8" in result.err
    assert "1 stages" in prune("store").out


def test_what_is_taken_is_young_again(prune, workplace):
    assert prune("run", *TRAIN).code == 0
    (entry,) = Store(workplace / "outputs/store").entries()
    os.utime(entry, (0, 0))
    assert prune("run", *TRAIN).code == 0
    assert time.time() - entry.stat().st_mtime < 3600


@pytest.mark.parametrize(
    "kind", ["file", "link to an empty folder", "dead link", "link to another result", "empty folder"]
)
@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_an_entry_that_is_no_folder_is_seen_before_the_stage_is_computed(prune, workplace, kind, suffix):
    assert prune("run", *TRAIN).code == 0
    (entry,) = Store(workplace / "outputs/store").entries()
    shutil.move(entry, workplace / "kept")
    (workplace / "empty").mkdir()
    place = entry.with_name(entry.name + suffix)
    if kind == "file":
        place.write_text("")
    elif kind == "empty folder":
        place.mkdir()
    else:
        if kind == "link to another result":
            (workplace / "kept/manifest.json").write_text('{"key": "another"}')
            sign(workplace / "kept")
        place.symlink_to(workplace / {"link to an empty folder": "empty", "dead link": "nowhere"}.get(kind, "kept"))
    result = prune("run", *TRAIN, "train.fit.checkpoint_seconds=0")
    assert result.code == 0, result.err
    assert (entry / "manifest.json").is_file() and not entry.is_symlink()
    if not suffix:
        assert result.err.index("is damaged") < result.err.index("train: starting")
    assert (workplace / "empty").is_dir() and (workplace / "kept/weights.safetensors").is_file(), (
        "what links point to stays"
    )


def test_a_result_under_the_key_of_another_stage_is_not_believed(prune, workplace):
    first = prune("run", *QUICK, "stages=[train,prune]")
    keys = first.rows.key
    store = workplace / "outputs/store"
    shutil.rmtree(store / keys["prune"])
    shutil.copytree(store / keys["train"], store / keys["prune"])
    again = prune("run", *QUICK, "stages=[train,prune]")
    assert again.code == 0 and "it is the result of another stage" in again.err
    assert again.rows.params_nonzero["prune"] == first.rows.params_nonzero["prune"] < first.rows.params_nonzero["train"]


@pytest.mark.parametrize("name", ["numbers.json", "manifest.json", "weights.safetensors"])
def test_no_digit_of_an_unfinished_checkpoint_can_be_changed(workplace, caplog, name):
    """Every digit of its files, one at a time: the checkpoint is as it was, or it is not used."""
    slot = Store(workplace).slot("k")
    history = [{"epoch": 1, "loss": 0.25, "acc1": 61.5}]
    numbers = {"epoch": 6, "step": 2, "done": False, "best_score": "0.5", "history": history}
    slot.save({"a": torch.arange(3.0)}, numbers)
    (path,) = workplace.glob(f"k.partial/*/{name}")
    kept = {file: file.read_bytes() for file in path.parent.iterdir()}
    digits = [place for place, byte in enumerate(kept[path]) if chr(byte).isdigit() or name.startswith("weights")]
    assert len(digits) > 5
    for place in digits:
        changed = bytearray(kept[path])
        changed[place] ^= 1  # 6 becomes 7
        path.parent.mkdir(exist_ok=True)
        for file, content in kept.items():
            file.write_bytes(content)
        path.write_bytes(changed)
        caplog.clear()
        assert slot.load() is None
        assert "will be ignored" in caplog.text
    assert not path.exists()


def test_an_unfinished_checkpoint_is_covered_by_its_manifest(workplace):
    slot = Store(workplace).slot("k")
    for extra, name in (({"b": 1}, "numbers.json"), ({}, "masks.safetensors"), ({}, "pruned.yaml")):
        slot.save({"a": torch.ones(1)}, {"n": 1})
        (folder,) = workplace.glob("k.partial/*")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"].pop(name, None)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / name).write_text(json.dumps(extra))
        assert slot.load() is None, "a file that no checksum covers is not read"


def test_lines_can_be_neither_moved_nor_taken_out(workplace, caplog):
    lines = Lines(workplace / "journal")
    for number in range(4):
        lines.append({"n": number})
    whole = lines.path.read_bytes().splitlines(keepends=True)
    for forged, left in (
        ([whole[0], *whole[2:]], 1), ([whole[1], whole[0], *whole[2:]], 0), ([*whole, whole[3]], 4), (whole[1:], 0),
    ):  # fmt: skip
        lines.path.write_bytes(b"".join(forged))
        assert [line["n"] for line in lines.read()] == list(range(left))
        assert "computed again" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("setting", ["fit.checkpoint_seconds"])
def test_what_changes_no_byte_is_no_part_of_the_key(prune, workplace, monkeypatch, setting):
    one = prune("run", *TRAIN, "deterministic=true", f"train.{setting}=0")
    again = prune("run", *TRAIN, "deterministic=true", f"train.{setting}=999")
    assert again.err.count("taken from the store") == 1
    monkeypatch.setenv("PRUNE_STORE", str(workplace / "other"))
    other = prune("run", *TRAIN, "deterministic=true", f"train.{setting}=999")
    assert "train: starting" in other.err
    assert (one.folder / "train/weights.safetensors").read_bytes() == (
        other.folder / "train/weights.safetensors"
    ).read_bytes()
    assert one.rows.drop(columns="seconds").equals(other.rows.drop(columns="seconds"))


def test_half_written_folders_of_killed_runs_go_with_the_next(prune, workplace):
    run = prune("run", *TRAIN)
    key = run.rows.key["train"]
    store = workplace / "outputs/store"
    shutil.rmtree(store / key)
    for name in (f".{key}.abcd1234", f"{key}.partial/.0.abcd"):
        (store / name).mkdir(parents=True)
        (store / name / "weights.safetensors").write_bytes(b"half")
    assert prune("run", *TRAIN).code == 0
    assert not [path.name for path in store.iterdir() if path.name.startswith(".") or path.suffix == ".partial"]


def test_a_damaged_entry_that_cannot_be_deleted_stops_the_run_before_it_computes(workplace, monkeypatch):
    store = Store(workplace)
    (workplace / "k").mkdir()
    monkeypatch.setattr(
        shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(StorageError, match=r"cannot write .*k: Permission denied"):
        store.find("k")
