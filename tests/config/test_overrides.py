"""What a user can type: every key that is printed can be set, for one stage alone too, and mistakes are told in our words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from prune_cli.config.compose import compose, hydra_arguments
from prune_cli.config.overrides import check_words
from prune_cli.errors import ConfigError

RECIPES = ("quickstart", "resnet56_cifar10_kd", "vgg16_cifar10_slim", "digits_admm", "transfer_filter")


def leaves(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def written(value: Any) -> str:
    """A value as Hydra's grammar reads it."""
    if isinstance(value, str):
        return f"'{value}'"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_that_is_shown_can_be_set(recipe, workplace):
    config = compose([f"recipe={recipe}"]).config
    keys = list(leaves(config))
    assert any(path.startswith("prune.granularity.") for path, _ in keys)
    again = compose([f"recipe={recipe}", *(f"{path}={written(value)}" for path, value in keys)])
    assert again.config == config


def stage(*overrides: str, name: str = "prune") -> dict[str, Any]:
    return compose(["recipe=quickstart", *overrides]).config[name]


def test_a_stage_alone_gets_another_value(workplace):
    config = compose(["recipe=quickstart", "prune.granularity.ratio=0.5", "granularity.min_keep=0.1"]).config
    assert config["prune"]["granularity"]["ratio"] == 0.5
    assert config["granularity"]["ratio"] == 0.8, "the other stages keep theirs"
    assert config["prune"]["granularity"]["min_keep"] == 0.1, "what is set for all still holds"
    assert (
        stage("granularity.ratio=0.3", "prune.granularity.ratio=${granularity.min_keep}")["granularity"]["ratio"] == 0.0
    )
    assert stage("prune.granularity.budget={macs: 0.5}")["granularity"]["budget"] == {"macs": 0.5}


@pytest.mark.parametrize("chosen", ["prune.granularity=filter", "granularity@prune.granularity=filter"])
def test_a_stage_alone_gets_another_option_which_keeps_what_the_recipe_set(chosen, workplace):
    found = stage(chosen)["granularity"]
    assert found["dependency"] == "group" and found["ratio"] == 0.8
    assert stage(chosen, "prune.granularity.ratio=0.3")["granularity"]["ratio"] == 0.3
    assert "dependency" not in compose(["recipe=quickstart", chosen]).config["granularity"]


def test_an_option_inside_a_stage_is_chosen_by_its_name_there(workplace):
    found = stage("train.optimizer=adam", name="train")["optimizer"]
    assert found["_target_"] == "torch.optim.Adam" and found["lr"] == 0.05, "the recipe's rate"
    assert "momentum" not in found


def test_a_node_of_a_recipe_that_is_another_ones_whole_can_be_set_beneath(workplace):
    (workplace / "recipes/recipe").mkdir(parents=True)
    (workplace / "recipes/recipe/twice.yaml").write_text(
        "# @package _global_\n# twice\nstages: [train, prune, again]\nagain: ${finetune}\n"
    )
    config = compose(["recipe=twice", "again.epochs=3", "again.optimizer.lr=0.5"]).config
    assert config["again"]["epochs"] == 3 and config["again"]["optimizer"]["lr"] == 0.5
    assert config["finetune"]["epochs"] == 40 and config["again"]["batch_size"] == 128


def test_tables_and_sweeps_know_the_option_of_the_stage(prune):
    result = prune(
        "run", "-m", "recipe=quickstart", "limit_batches=1", "stages=[train,prune]", "prune.criterion=l2,random",
        "prune.granularity.ratio=0.5",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (
        "job 1: recipe=quickstart" in result.err and "prune.criterion=random prune.granularity.ratio=0.5" in result.err
    )
    import pandas

    rows = pandas.read_csv(result.folder / "results.csv").set_index(["job", "stage"])
    assert rows.loc[(0, "prune"), "criterion"] == "l2" and rows.loc[(1, "prune"), "criterion"] == "random"
    assert rows.loc[(0, "prune"), "ratio_requested"] == 0.5


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("prune.granularity.ratoi=0.5", "prune.granularity.ratoi: unknown key; did you mean 'ratio'"),
        ("prune.granularity.ratio=1.5", "prune.granularity.ratio: input should be less than 1, got 1.5"),
        ("prun.granularity.ratio=0.5", "prun: unknown key; did you mean 'prune'"),
        ("prune.criterion=tailor", "prune.criterion=tailor: there is no such option; did you mean 'taylor'"),
        ("granularity.rules=[{name: conv1}]", "granularity.rules.0.name: unknown key; did you mean 'names'"),
        ("train.epochs=true", "train.epochs: input should be a number, not true"),
        ("train.optimizer.lr=true", "train.optimizer.lr: input should be a number, not true"),
        (
            "granularity.rules=[{types: [Conv2d], ratio: true}]",
            "granularity.rules.0.ratio: input should be less than 1, got True",
        ),
        ("~model", "model: needs a value"),
        ("~seed", "seed: needs a value"),
        ("~train", "stages: there is no stage 'train'"),
        ("~stages", "stages: needs a value"),
        ("~train.epochs", "train: needs a value for epochs"),
        ("~nothing", "~nothing: there is no such key"),
        ("stages=prune", "stages: input should be a valid list"),
        ("dataset._target_=builtins.dict", "dict does not say which parameters it has"),
        ("~dataset._target_", "is no dataset"),
        ("device=meta", "'meta' is not a device; use auto"),
        ("device=xla", "'xla' is not a device"),
        ("device=null", "device: None is not a device"),
        ("device=cpu:7", "there is no cpu:7"),
        ("threads=100000", "threads=100000: must be at least 1 and at most"),
        ("dataset.image_size=100000", "this machine has"),
        ("dataset.val=1.0", "dataset.val=1.0: give a fraction in [0, 1) or a whole number of images"),
    ],
)
def test_what_is_wrong_with_a_value_is_said_with_a_key_that_can_be_set(prune, workplace, word, message):
    result = prune("run", "recipe=quickstart", "limit_batches=1", word)
    assert result.code == 2 and message in result.err, result.err
    assert len(result.err.splitlines()) == 1
    assert not (workplace / "outputs").exists(), "no folder of a run that never began"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a b"], "'a b' is not an override; write key=value"),
        (["="], "'=' is not an override"),
        (["quickstart"], "did you mean recipe=quickstart?"),
        (["model="], "model=: needs the name of an option; see `prune list model`"),
        (["model=null"], "needs the name of an option"),
        (["criterion=l1,l2"], "several options are a sweep; give -m too"),
        (["seed=1,2"], "seed=1,2: several values are a sweep, which needs -m; a list is written seed=[1,2]"),
        (["--nonsense"], "there is no option '--nonsense'"),
        (["--dry-run"], "prune show recipe=NAME --estimate"),
        (["stages={a:1}"], "stages: the value is of another kind than in the recipe: a list is written [a,b]"),
        (["granularity=[a]"], "granularity=a: there is no such option"),
        (["seed='"], "the value cannot be read"),
        (["granularity.rules=[{a"], "the value cannot be read"),
        (["optimizer=adam"], "every stage has its own; give for example train.optimizer=adam"),
        (["stage=train"], "stages=[train,prune,finetune]"),
        (["x@y=z"], "x: there is no such group of options"),
        (["granularity.ratio=${nope}"], "granularity.ratio: there is no key 'nope'"),
        (["model=" + "x" * 5000], "there is no such option"),
        (["x" * 5000 + "=1"], "unknown key"),
    ],
)  # fmt: skip
def test_words_that_hydra_would_explain_in_its_own_are_explained_in_ours(prune, workplace, words, message):
    result = prune("run", "recipe=quickstart", *words)
    assert result.code == 2 and message in result.err, result.err
    assert len(result.err.splitlines()) == 1 and len(result.err) < 2100
    assert "ydra" not in result.err and "_own_" not in result.err
    assert not (workplace / "outputs").exists()


@pytest.mark.parametrize("text", ["", "# @package recipe\nseed: 3\n", "stages: [train]\n"])
def test_a_recipe_without_its_first_line_is_told_so(prune, workplace, text):
    (workplace / "recipes/recipe").mkdir(parents=True)
    (workplace / "recipes/recipe/mine.yaml").write_text(text)
    result = prune("run", "recipe=mine")
    assert result.code == 2 and "first line of a recipe must be '# @package _global_'" in result.err, result.err


def test_flags_are_for_run_alone():
    check_words(["-m", "--config-dir", "somewhere", "seed=1"], flags=True)
    with pytest.raises(ConfigError, match="no option '-m'"):
        check_words(["-m"])


def test_nothing_changes_for_what_hydra_can_compose_itself(workplace):
    words = [
        "recipe=quickstart",
        "granularity.ratio=0.5",
        "+criterion@sensitivity.compare.random=random",
        "hydra.run.dir=x",
    ]
    assert hydra_arguments(words)[: len(words)] == words
