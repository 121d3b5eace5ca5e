"""Files of lines: what was appended is read, and a damaged end costs no more than itself."""

from __future__ import annotations

import pytest

from prune_cli.errors import StorageError
from prune_cli.files.lines import Lines

VALUES = [{"a": 1.5, "b": "ä"}, [1, None], "text\nwith a break"]


@pytest.fixture
def lines(tmp_path) -> Lines:
    found = Lines(tmp_path / "folder" / "lines")
    for value in VALUES:
        found.append(value)
    return found


def test_what_was_appended_is_read(lines):
    assert lines.read() == VALUES
    assert lines.path.read_bytes().count(b"\n") == 3


def test_a_file_that_is_not_there_is_empty(tmp_path):
    assert Lines(tmp_path / "none").read() == []
    assert not list(tmp_path.iterdir())


def test_cut_at_any_byte_the_whole_lines_remain_and_new_ones_follow_them(lines):
    content = lines.path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content)):
        lines.path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends)
        assert lines.read() == VALUES[:whole]
        lines.append("new")
        assert lines.read() == [*VALUES[:whole], "new"]


def test_from_an_altered_line_on_everything_is_forgotten(lines):
    content = bytearray(lines.path.read_bytes())
    content[content.index(b"\n") + 20] ^= 1  # in the second line
    lines.path.write_bytes(content)
    assert lines.read() == VALUES[:1]
    assert lines.path.read_bytes() == content[: content.index(b"\n") + 1]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        Lines(tmp_path / "file" / "lines").append(1)
