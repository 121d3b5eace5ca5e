"""A result is computed again when a module of ours that it depends on has changed, and only then."""

from __future__ import annotations

import shutil

import pytest

from prune_cli.pipeline import code

TINY = ("recipe=quickstart", "dataset=fake", "limit_batches=1", "latency=false", "device=cpu", "granularity=filter")
FINETUNE = {"_target_": "prune_cli.stages.finetune.finetune"}


@pytest.fixture
def edit(monkeypatch):
    """Changes what a module's source is said to be."""
    real = code._source

    def change(module: str, add: str) -> None:
        changed = {module: real(module) + add}
        monkeypatch.setattr(code, "_source", lambda name: changed.get(name) or real(name))
        code.hash_of.cache_clear()
        code._imports.cache_clear()

    yield change
    code.hash_of.cache_clear()
    code._imports.cache_clear()


def test_imports_are_followed_through_the_package():
    behind = code.code_behind(FINETUNE)
    assert {"prune_cli.stages.finetune", "prune_cli.training.fit", "prune_cli.masks"} <= behind.keys()
    assert not any(
        name.startswith(("prune_cli.console", "prune_cli.pipeline", "prune_cli.commands")) for name in behind
    )


def test_targets_count_at_any_depth():
    node = FINETUNE | {"deep": [{"er": {"_target_": "prune_cli.criteria.clustering.clustering"}}]}
    assert "prune_cli.criteria.clustering" in code.code_behind(node)
    assert "prune_cli.criteria.clustering" not in code.code_behind(FINETUNE)


@pytest.mark.parametrize("silent", ["# why\n", '\n"""What."""\n', "\n\n"])
def test_comments_and_docstrings_are_no_change(edit, silent):
    before = code.code_behind(FINETUNE)
    edit("prune_cli.training.fit", silent)
    assert code.code_behind(FINETUNE) == before


def test_a_new_import_counts_with_what_it_imports(edit):
    before = code.code_behind(FINETUNE)
    edit("prune_cli.masks", "\nfrom prune_cli.criteria import clustering\n")
    found = code.changed(before, code.code_behind(FINETUNE))
    assert {"criteria/clustering.py", "criteria/criterion.py", "masks.py"} <= set(found)
    assert "training/fit.py" not in found


def test_a_fix_recomputes_what_it_touched_and_says_so(prune, edit):
    first = prune("run", *TINY)
    assert first.code == 0, first.err
    edit("prune_cli.console", "\nX = 1\n")
    assert "taken from the store" in prune("run", *TINY).err
    edit("prune_cli.granularities.filter", "\nX = 1\n")
    again = prune("run", *TINY)
    assert "train: taken from the store" in again.err
    assert "prune: computed again, as granularities/filter.py changed since the stored result" in again.err
    assert list(again.rows.key != first.rows.key) == [False, True, True]  # what follows goes on from the new result


def test_damaged_notes_only_cost_the_message(prune, edit, workplace):
    assert prune("run", *TINY).code == 0
    notes = sorted((workplace / "outputs/store/code").glob("*.json"))
    assert len(notes) == 3
    for note, text in zip(notes, ["", "[]", '{"code": 3}'], strict=True):
        note.write_text(text)
    edit("prune_cli.training.fit", "\nX = 1\n")
    again = prune("run", *TINY)
    assert again.code == 0
    assert "computed again" not in again.err


def test_gc_forgets_notes_of_results_that_are_gone(prune, workplace):
    result = prune("run", *TINY)
    shutil.rmtree(result.folder)
    assert prune("store", "--gc", "--hours", "0").code == 0
    assert not list((workplace / "outputs/store/code").glob("*.json"))
