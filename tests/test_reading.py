"""The one way in for text: plain values in bounds, or one line that names the file."""

from __future__ import annotations

import ast
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_cli import reading
from prune_cli.errors import CheckpointError, ConfigError
from tests.conftest import ROOT

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 11)
)
MERGES = "a0: &a0 {k0: 1, k1: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 11)
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize(
    "text",
    [
        ALIASES,
        MERGES,
        "a: &a [*a]",
        "a: &a {b: [*a]}",
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "? " * 100_000,
        "[0" + ", 0" * 2_500_000 + "]",
        "n: " + "9" * 100_000,
        "n: " + "1:" * 100_000 + "1",  # base 60, which takes the square of its length
        'n: !!int "' + "1: " * 100_000 + '1"',
        "{" + ", ".join(f"{n * (2**61 - 1)}: 0" for n in range(50_000)) + "}",  # keys of one hash
    ],
    ids=lambda text: text[:12],
)
def test_bombs_in_yaml_are_refused_before_they_grow(text):
    with pytest.raises(CheckpointError) as error:
        reading.parse_yaml(text, "theirs.yaml")
    assert str(error.value).startswith("theirs.yaml") and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "{} {}", "[" * 100_000, "[" * 80 + "]" * 80, '{"a":' * 5_000, "\x00", '"\\ud800"', b"\xff\xfe[\x00",
        '{"n": ' + "9" * 10_000 + "}", "[" + "0," * 2_500_000 + "0]",
    ],
    ids=lambda text: str(text[:12]),
)  # fmt: skip
def test_what_is_no_json_in_bounds_is_refused_in_one_line(text):
    with pytest.raises(CheckpointError) as error:
        reading.parse_json(text, "theirs.json")
    assert str(error.value).startswith("theirs.json") and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [true]", "!!python/name:os.system", "a: !mine 1", "a: 2026-11-25", "a: !!binary aGk=",
        "a: !!set {b}", "{[a]: b}", "a: b: c", "a\x00b", "--- a\n--- b", "*a", "%", "<<: 3", "\ud800",
    ],
)  # fmt: skip
def test_yaml_of_other_things_than_plain_values_is_refused(text):
    with pytest.raises(ConfigError, match=r"^mine\.yaml"):
        reading.parse_yaml(text, "mine.yaml", ConfigError)


def test_aliases_that_stay_small_are_read():
    assert reading.parse_yaml("a: &x [1, 2]\nb: *x\nc: &y {d: 1}\ne: {<<: *y}", "") == {
        "a": [1, 2], "b": [1, 2], "c": {"d": 1}, "e": {"d": 1},
    }  # fmt: skip


@given(PLAIN)
def test_plain_values_come_back(value):
    import json

    import yaml

    assert reading.parse_json(json.dumps(value), "") == value
    assert reading.parse_yaml(yaml.safe_dump(value), "") == value


@given(st.binary(max_size=200), st.sampled_from([reading.read_json, reading.read_yaml, reading.read_table]))
def test_any_bytes_give_plain_values_or_one_line(tmp_path_factory, content, read):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    try:
        read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


def test_text_that_is_no_utf_8_says_where(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("# one\n# café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine\.yaml is no text in UTF-8: byte 0xe9 in line 2"):
        reading.read_text(tmp_path / "mine.yaml", ConfigError)
    (tmp_path / "mine.yaml").write_bytes("\ufeffa: é".encode())
    assert reading.read_yaml(tmp_path / "mine.yaml") == {"a": "é"}


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "link", "/dev/zero", "a\0b"):
        done = []
        thread = threading.Thread(target=lambda path=path, done=done: done.append(_refusal(path)), daemon=True)
        thread.start()
        thread.join(20)
        assert done and "can't read" in done[0]


def _refusal(path) -> str:
    try:
        reading.read_text(path)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(reading.SIZE + 1)
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        reading.read_text(tmp_path / "large")


PARSERS = {
    "yaml": {"load", "safe_load", "full_load", "unsafe_load", "load_all", "safe_load_all", "parse", "compose"},
    "json": {"load", "loads"},
    "pickle": {"load", "loads", "Unpickler"},
    "OmegaConf": {"load"},
}
# What parses text that no file held: a broadcast, and a round trip through JSON that makes lists of tuples.
NOT_FILES = {
    ("training/distributed.py", "json.loads"),
    ("session/course.py", "json.loads"),
    ("pipeline/loading.py", "json.loads"),
}


def test_no_other_module_parses_files():
    found = set()
    for path in sorted((ROOT / "prune_cli").rglob("*.py")):
        name = path.relative_to(ROOT / "prune_cli").as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.attr in PARSERS.get(node.value.id, ()):
                    found.add((name, f"{node.value.id}.{node.attr}"))
            elif isinstance(node, ast.ImportFrom) and node.module in PARSERS:
                assert not {alias.name for alias in node.names} & PARSERS[node.module], name
            if isinstance(node, ast.Attribute) and node.attr == "read_text":
                found.add((name, "read_text"))
    ours = {("reading.py", "json.loads"), ("reading.py", "yaml.load"), ("reading.py", "yaml.parse")}
    # The source of our own modules, and what the kernel says of the CPU.
    source = {("pipeline/code.py", "read_text"), ("training/precision.py", "read_text")}
    assert found - source - {("data/cifar_pickle.py", "pickle.Unpickler")} == ours | NOT_FILES
