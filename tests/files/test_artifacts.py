"""Writes that are whole or did not happen, and tables that lose no digit."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_cli.errors import StorageError
from prune_cli.files import artifacts


class Cut(Exception):
    """What ends a write in its middle."""


def test_a_write_that_is_cut_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    artifacts.write_text(file, "old")
    with pytest.raises(Cut), artifacts.new_file(file) as temporary:
        temporary.write_text("half of the new")
        raise Cut
    assert file.read_text() == "old" and os.listdir(file.parent) == ["a.txt"]
    artifacts.write_text(file, "new é")
    assert file.read_bytes() == "new é".encode() and file.stat().st_mode & 0o777 == 0o644


def test_a_folder_takes_the_place_of_another_only_when_it_is_complete(tmp_path):
    folder = tmp_path / "stage"
    for content in ("first", "second"):
        with artifacts.new_folder(folder) as temporary:
            (temporary / content).write_text(content)
            assert not (folder / content).exists()
        assert os.listdir(folder) == [content]
    with pytest.raises(Cut), artifacts.new_folder(folder) as temporary:
        (temporary / "third").write_text("third")
        raise Cut
    assert os.listdir(folder) == ["second"] and os.listdir(tmp_path) == ["stage"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/a\.json.*hydra\.run\.dir") as caught:
        artifacts.write_json(tmp_path / "file" / "a.json", {})
    assert "\n" not in str(caught.value)


def test_json_is_sorted_so_that_equal_results_are_equal_bytes(tmp_path):
    artifacts.write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    artifacts.write_json(tmp_path / "b.json", {"a": [1.5, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.5, None], "b": 1}


@dataclass(frozen=True)
class Line:
    name: str
    value: float | None


@given(
    st.lists(st.builds(Line, st.text(st.characters(codec="utf-8", exclude_characters="\r\0")), st.floats() | st.none()))
)
def test_a_table_keeps_every_digit_and_none_is_an_empty_cell(lines):
    rows = list(csv.DictReader(io.StringIO(artifacts.table(Line, lines), newline="")))
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        assert row["name"] == line.name
        found = float(row["value"]) if row["value"] else None
        assert found == line.value or (line.value is not None and math.isnan(line.value) and math.isnan(found or 0.0))


def test_both_ways_to_write_a_table_give_the_same_bytes(tmp_path):
    lines = [Line("a,b", None), Line('"', 1 / 3)]
    artifacts.write_table(tmp_path / "a.csv", [vars(line) for line in lines], ["name", "value"])
    assert (tmp_path / "a.csv").read_text() == artifacts.table(Line, lines)


def test_a_linked_folder_holds_the_same_files_and_survives_the_first(tmp_path, monkeypatch):
    source = tmp_path / "store"
    source.mkdir()
    (source / "weights").write_text("w")
    artifacts.link_folder(source, tmp_path / "linked")
    assert os.path.samefile(source / "weights", tmp_path / "linked" / "weights")

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    artifacts.link_folder(source, tmp_path / "copied")
    assert not os.path.samefile(source / "weights", tmp_path / "copied" / "weights")
    (source / "weights").unlink()
    assert (tmp_path / "linked" / "weights").read_text() == (tmp_path / "copied" / "weights").read_text() == "w"


def test_files_of_snapshots_are_found_by_their_pattern(tmp_path):
    for tag in ("0", "3ep", "500st"):
        (tmp_path / artifacts.remembered(tag)).touch()
    (tmp_path / artifacts.WEIGHTS).touch()
    assert len(list(tmp_path.glob(artifacts.remembered("*")))) == 3
