"""Every YAML option of the group `dataset` against the function it names."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from pathlib import Path

import pydantic
import pytest
import yaml

from prune_cli.config import option_files

OPTIONS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "dataset").glob("*.yaml"))
SHARED = {"val", "split_seed", "flip", "normalize", "mean", "std", "fake"}


def load(option: Path) -> tuple[typing.Any, dict[str, object]]:
    node: dict[str, typing.Any] = {}
    for path in option_files.files(f"dataset/{option.stem}"):
        node |= yaml.safe_load(path.read_text())
    node.pop("defaults", None)
    module, name = node.pop("_target_").rsplit(".", 1)
    return getattr(importlib.import_module(module), name), node


def test_all_sets_are_there() -> None:
    assert {option.stem for option in OPTIONS} >= {
        "digits",
        "cifar10",
        "cifar100",
        "imagenet",
        "image_folder",
        "fake",
        "mnist",
        "fashion_mnist",
    }


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.stem)
def test_option_describes_its_function(option: Path) -> None:
    make, keys = load(option)
    parameters = inspect.signature(make).parameters
    assert set(keys) == set(parameters)
    assert set(keys) >= SHARED
    hints = typing.get_type_hints(make)
    for key, value in keys.items():
        pydantic.TypeAdapter(hints[key]).validate_python(value)
        default = parameters[key].default
        if key != "root":  # the YAML names an environment variable
            assert value == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.stem)
def test_option_has_a_description_and_a_comment_per_key(option: Path) -> None:
    first, *_ = option.read_text().splitlines()
    assert first.startswith("# ") and len(first) > 20
    text = "\n".join(path.read_text() for path in option_files.files(f"dataset/{option.stem}"))
    commented = set(re.findall(r"^(\w+):.*  # ", text, re.M))
    assert commented >= set(load(option)[1])


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.stem)
def test_every_option_runs_without_its_files(option: Path) -> None:
    make, keys = load(option)
    data = make(**{**keys, "fake": True}).limit(1)
    ((x, y),) = data.train(16, 0).epoch(0)
    assert x.shape == (16, *data.shape) and y.shape == (16,)
    assert len(list(data.evaluation("test", 16))) == 1
