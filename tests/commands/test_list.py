"""`prune list`: recipes by dataset and method, a word to look for, lines that end where the screen does."""

from __future__ import annotations

import os
import shutil
import sys

from prune_cli.commands import list as listing
from prune_cli.config.locations import options


def test_recipes_stand_by_dataset_and_by_what_they_remove(prune):
    lines = prune("list", "recipe").out.splitlines()
    assert lines[0] == "recipe"
    heads = [line.strip() for line in lines if line.startswith("  ") and not line.startswith("    ")]
    assert heads == sorted(heads) and {"digits, single weights", "cifar10, filters", "imagenet, N:M"} <= set(heads)
    names = [line.split()[0] for line in lines if line.startswith("    ")]
    assert sorted(names) == sorted(options("recipe"))
    below = lines[lines.index("  imagenet, patterns") + 1]
    assert "imagenet_patdnn" in below


def test_a_word_filters(prune):
    found = prune("list", "recipe", "slim").out
    assert "vgg16_cifar10_slim" in found and "quickstart" not in found
    assert "slim" in prune("list", "recipe", "SLIM", "cifar100").out
    assert "fpgm" in prune("list", "criterion", "median").out
    refused = prune("list", "recipe", "nonsuch")
    assert refused.code == 2 and "no recipe has nonsuch" in refused.err


def test_a_recipe_that_cannot_be_read_hides_no_other(prune, workplace):
    folder = workplace / "recipes/recipe"
    folder.mkdir(parents=True)
    (folder / "cut.yaml").write_text("# @package _global_\n# cut off\ndefaults: [")
    (folder / "mine.yaml").write_text("# @package _global_\n# mine\ndefaults:\n  - override /dataset: cifar10\n")
    lines = prune("list", "recipe").out.splitlines()
    assert "cut" in lines[-1] and lines[-2].strip() == "~ cannot be read"
    assert any(line.split() == ["mine", "mine"] for line in lines)


def test_on_a_terminal_lines_go_on_below_their_text(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((80, 24)))
    assert listing.main(["criterion"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(" " * 15) for line in lines), "the rest of a long line"
