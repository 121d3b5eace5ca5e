"""Config nodes: what is wrong is found at once, with the key's path and the nearest right name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from prune_cli.config.content import content_key
from prune_cli.config.nodes import Flat, resolve
from prune_cli.errors import ConfigError

HERE = __name__


def scale(value: float, *, factor: float = 2.0, name: str = "x") -> float:
    return value * factor


@dataclass(frozen=True)
class Inner:
    size: int
    path: Path | None = None


def outer(state: object, *, inner: Inner, sizes: tuple[int, ...] = (), kind: str = "a") -> Inner:
    return inner


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "own_code", sys.modules[HERE])


def test_partial_is_completed_by_its_caller():
    made = resolve({"_target_": "own_code.scale", "_partial_": True, "factor": 3}, "score")
    assert isinstance(made, functools.partial)
    assert made(2.0) == 6.0


def test_a_mapping_becomes_the_annotated_dataclass():
    made = resolve({"_target_": "own_code.outer", "inner": {"size": 3}, "sizes": [1, 2]}, "stage", runtime=("state",))
    assert made(None) == Inner(3)
    assert made.keywords["sizes"] == (1, 2)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"_target_": "own_code.scale", "_partial_": True, "facto": 3},
            r"score\.facto: unknown key; did you mean 'factor'",
        ),
        ({"_target_": "own_code.scale", "_partial_": True, "factor": "three"}, r"score\.factor: .*number.*'three'"),
        ({"_target_": "own_code.scal", "_partial_": True}, r"has no 'scal'; did you mean 'scale'"),
        ({"_target_": "no_such_module.f"}, r"cannot import 'no_such_module'"),
        ({"_target_": "nothing"}, "not a dotted name"),
        ({"_target_": "own_code.outer", "inner": {"siez": 3}}, r"score\.inner\.siez: unknown key; did you mean 'size'"),
        ({"_target_": "own_code.outer", "inner": {}}, r"score\.inner: needs a value for size"),
        ({"_target_": "own_code.outer", "inner": {"size": 1.5}}, r"score\.inner\.size: .*integer.*1\.5"),
    ],
)
def test_mistakes_are_named_with_their_path(node, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(node, "score", runtime=("state",) if "outer" in node["_target_"] else ())
    assert "\n" not in str(caught.value)


def test_key_changes_with_the_content_of_a_file_and_not_with_its_place(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("x")
    second.write_text("x")
    assert content_key({"file": str(first)}) == content_key({"file": str(second)})
    second.write_text("y")
    assert content_key({"file": str(first)}) != content_key({"file": str(second)})


def test_key_changes_with_the_source_of_user_code(tmp_path, monkeypatch):
    import sys

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("def f():\n    return 1\n")
    before = content_key({"_target_": "mine.f"})
    (tmp_path / "mine.py").write_text("def f():\n    return 2\n")
    sys.modules.pop("mine")
    assert content_key({"_target_": "mine.f"}) != before


@dataclass(frozen=True, kw_only=True)
class How:
    size: Annotated[int, Field(ge=1)]
    inner: Inner
    smooth: float = 0.0


def trained(state: object, *, epochs: int, how: Annotated[How, Flat()]) -> How:
    return how


FLAT = {"_target_": "own_code.trained", "epochs": 3, "size": 2, "inner": {"size": 5}}


def test_a_flat_parameter_takes_its_fields_from_the_keys_of_the_node():
    made = resolve(FLAT, "stage", runtime=("state",))
    assert made.keywords == {"epochs": 3, "how": How(size=2, inner=Inner(5))}
    assert made(None).size == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"siez": 3}, r"stage\.siez: unknown key; did you mean 'size'"),
        ({"epohcs": 3}, r"stage\.epohcs: unknown key; did you mean 'epochs'"),
        ({"how": 3}, r"stage\.how: unknown key"),
        ({"size": 0}, r"stage\.size: .*greater than or equal to 1.*0"),
        ({"inner": {"siez": 3}}, r"stage\.inner\.siez: unknown key; did you mean 'size'"),
        ({"size": None}, r"stage\.size: .*integer.*None"),
    ],
)
def test_mistakes_in_flat_keys_are_named_as_any_other(change, message):
    with pytest.raises(ConfigError, match=message):
        resolve({**FLAT, **change}, "stage", runtime=("state",))


def test_a_missing_flat_key_is_named():
    node = {key: value for key, value in FLAT.items() if key != "size"}
    with pytest.raises(ConfigError, match="stage: needs a value for size"):
        resolve(node, "stage", runtime=("state",))


def test_targets_of_older_recipes_are_found_where_they_are_now():
    assert resolve({"_target_": "prune_cli.lr_schedules.cosine", "_partial_": True}, "lr")(0.0, 10) == 1.0
