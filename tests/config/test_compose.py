"""Composition: options of one's own, and keys that belong to another option."""

from __future__ import annotations

from tests.runs.test_cli import QUICK


def test_own_recipes_in_a_folder_of_any_name(prune, workplace, monkeypatch):
    odd = workplace / "a=b, [c]'s ü"
    odd.mkdir()
    monkeypatch.chdir(odd)
    assert prune("copy", "quickstart", "mine").code == 0
    result = prune("show", "recipe=mine")
    assert result.code == 0, result.err


def test_user_code_and_recipes_beside_the_shipped_ones(prune, workplace, monkeypatch):
    folder = workplace / "elsewhere"
    (folder / "criterion").mkdir(parents=True)
    (folder / "criterion/negative.yaml").write_text(
        "# keeps the smallest\nscore: {_target_: own_scores.negative, _partial_: true}\nlevel: element\nneeds: []\n"
    )
    (workplace / "own_scores.py").write_text("def negative(view):\n    return -view.weight.abs()\n")
    monkeypatch.setenv("PRUNE_RECIPES", str(folder))
    result = prune("run", *QUICK, "criterion=negative", "stages=[train,prune]")
    assert result.code == 0, result.err
    assert result.rows.loc["prune", "criterion"] == "negative"


def test_another_option_drops_the_keys_that_a_recipe_set_for_its_own(prune):
    result = prune(
        "run", "recipe=lenet_digits_irre", *QUICK[1:3], "latency=false", "stages=[train,prune]", "schedule=one_shot",
        "lr_schedule@train.lr_schedule=cosine",
    )  # fmt: skip
    assert result.code == 0, result.err
    refused = prune("run", "recipe=lenet_digits_irre", "schedule=one_shot", "schedule.retrain_epoch=3")
    assert refused.code == 2
    assert "schedule.retrain_epoch: unknown key" in refused.err
