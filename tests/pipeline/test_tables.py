"""Tables in the store: computed once, whoever asks; cut, they go on; damaged, they are computed again; never too many."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from prune_cli.errors import Interrupted, StorageError
from prune_cli.pipeline import tables
from prune_cli.pipeline.store import Slot, Store

ROWS = torch.arange(40.0).view(20, 2)


class Parts:
    """Four rows at a time; remembers where it was asked to begin and how many rows it made."""

    def __init__(self, die_after: int = 99) -> None:
        self.begun: list[int] = []
        self.made, self.die_after = 0, die_after

    def __call__(self, start: int):
        self.begun.append(start)
        for first in range(start, 20, 4):
            if self.made >= self.die_after:
                raise KeyboardInterrupt
            self.made += 4
            yield ROWS[first : first + 4]


def ask(store: Store, parts: Parts, key: str = "a", stop=lambda: False) -> torch.Tensor:
    return tables.table(store, key, (20, 2), parts, what="a table", stop=stop)


def test_what_is_there_is_not_computed_again(tmp_path: Path) -> None:
    parts = Parts()
    assert torch.equal(ask(Store(tmp_path), parts), ROWS)
    assert torch.equal(ask(Store(tmp_path), parts), ROWS)
    assert parts.begun == [0] and parts.made == 20


def test_who_is_killed_goes_on_from_the_rows_that_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        ask(Store(tmp_path), Parts(die_after=12))
    (tmp_path / "a.logits" / ".9.torn").mkdir()  # as a kill in the middle of a writing leaves
    parts = Parts()
    assert torch.equal(ask(Store(tmp_path), parts), ROWS)
    assert parts.begun == [12]
    assert not list((tmp_path / "a.logits").glob(".*"))


def test_who_is_asked_to_stop_keeps_the_rows_so_far(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="a table"):
        ask(Store(tmp_path), Parts(), stop=lambda: True)
    parts = Parts()
    assert torch.equal(ask(Store(tmp_path), parts), ROWS) and parts.begun == [4]


@pytest.mark.parametrize("what", ["a flipped bit", "another shape", "other numbers"])
def test_what_is_damaged_or_of_another_shape_is_computed_again(tmp_path: Path, what: str) -> None:
    ask(Store(tmp_path), Parts())
    if what == "a flipped bit":
        (file,) = (tmp_path / "a.logits").glob("*/weights.safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        rows = torch.zeros(20, 3) if what == "another shape" else torch.zeros(20, 2, dtype=torch.float16)
        Slot(tmp_path / "a.logits").save({"logits": rows}, {})
    parts = Parts()
    assert torch.equal(ask(Store(tmp_path), parts), ROWS) and parts.begun == [0]


def test_of_two_one_computes_and_the_other_waits(tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(Parts):
        def __call__(self, start: int):
            begun.set()
            assert go.wait(20)
            yield from super().__call__(start)

    first, second, found = Slow(), Parts(), []
    threads = [
        threading.Thread(target=lambda parts=parts: found.append(ask(Store(tmp_path), parts)))
        for parts in (first, second)
    ]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(20)
    assert first.begun == [0] and second.begun == [] and all(torch.equal(one, ROWS) for one in found)
    assert len(found) == 2


def test_those_that_were_not_used_for_longest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for age, key in enumerate("abc"):
        ask(store, Parts(), key)
        os.utime(tmp_path / f"{key}.logits", (1000 + age, 1000 + age))
    ask(store, Parts(), "a")  # used just now
    one = sum(file.stat().st_size for file in (tmp_path / "a.logits").rglob("*") if file.is_file())
    monkeypatch.setattr(tables, "MOST", 3 * one)
    with store.lock("b", "somebody at work"):
        ask(store, Parts(), "d")
    assert sorted(path.name for path in tmp_path.glob("*.logits")) == ["a.logits", "b.logits", "d.logits"]


def test_a_full_disk_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def full(*_: object) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(Slot, "save", full)
    assert torch.equal(ask(Store(tmp_path), Parts()), ROWS)
    assert "not kept" in caplog.text and "no space left" in caplog.text


def test_the_broom_takes_tables_and_the_list_counts_them(
    prune, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNE_STORE", str(workplace / "store"))
    ask(Store(workplace / "store"), Parts())
    assert "1 tables of logits" in prune("store").out
    assert "a table that can be computed again" in prune("store", "--gc", "--hours", "0", "--dry-run").out
    assert "deleted 0 folders" in prune("store", "--gc").out, "what is young stays"
    assert "deleted 1 folders" in prune("store", "--gc", "--hours", "0").out
