"""What options are made of: shared files, comments on keys, and a user's own files beside them."""

from __future__ import annotations

import pytest
import yaml

from prune_cli.config import option_files
from prune_cli.config.compose import compose
from prune_cli.config.locations import GROUPS, options


def test_an_option_has_the_keys_of_the_files_that_its_defaults_take_in():
    assert option_files.keys("granularity/n_m") == {"units", "ratio", "rules", "ratio_file"}
    assert {"scope", "budget", "ratio", "shrink", "dependency"} < option_files.keys("granularity/filter")
    assert option_files.keys("model/resnet34") == option_files.keys("model/resnet18") - {"defaults"}
    assert option_files.keys("granularity/nothing") == set()


@pytest.mark.parametrize("group", [group for group in GROUPS if group not in ("recipe", "criterion")])
def test_show_has_a_comment_for_every_key_of_an_option_that_its_files_explain(group):
    """All keys but those of Hydra's own and of structure have one: whoever adds a key says what it is."""
    bare = {
        "_target_",
        "_partial_",
        "units",
        "loss",
        "momentum",
        "nesterov",
        "betas",
        "fit",
        "granularity",
        "criterion",
    }
    bare |= {"schedule", "distillation", "optimizer", "lr_schedule"}
    for name in options(group):
        found = option_files.Comments()
        for path in option_files.files(f"{group}/{name}"):
            found.read(path, group)
        for key in option_files.keys(f"{group}/{name}") - bare:
            assert found.of(f"{group}.{key}") or (name == "none" and key == "teacher"), (name, key)


def test_show_prints_every_key_with_its_comment_and_what_it_prints_is_the_config(prune):
    keys = ("recipe=quickstart", "granularity=filter", "granularity.scope=global", "distillation=hinton")
    shown = prune("show", *keys, "--config").out.split("\nrecipe  ")[0]
    assert yaml.safe_load(shown) == compose(list(keys)).config
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines.count("clip: null # largest gradient norm") == 3, "of fit, in every stage that trains"
    assert any(line.startswith("scope: global # ") and "layer = each" in line for line in lines)
    assert "min_keep: 0.0 # fraction of a layer's units that always stays; at least one unit does" in lines
    assert any(line.startswith("val: 0.1 # fraction in [0, 1)") for line in lines)
    assert lines.count("teacher: dense # dense = the network before the first pruning stage | PATH of weights or of a "
                       "stage folder") == 3, "also where a stage takes the node over whole"  # fmt: skip
    assert any("union_keep = a channel goes only when every layer votes so | inner_only" in line for line in lines)


def test_comments_end_where_values_begin(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text('# head\na: 1  # first\nb:  # block\n  c: "x # y"\n  d: [1, 2]   # list\n  # stray\ne: null\n')
    found = option_files.Comments()
    found.read(file, "p")
    assert {key: found.of(f"p.{key}") for key in ("a", "b", "b.d", "e")} == {
        "a": "first", "b": "block", "b.d": "list stray", "e": "",
    }  # fmt: skip


def test_shared_files_are_no_options(prune):
    listed = prune("list").out
    assert "\nfit\n  default" in listed
    assert "shared" not in listed and "ranking" not in listed


def test_another_option_keeps_the_keys_that_a_shared_file_gives_it(prune):
    """A recipe's own `granularity.scope` survives another granularity that has such a key, and goes where it has not."""
    kept = compose(["recipe=vgg16_cifar10_slim", "granularity=element"]).config["granularity"]
    assert kept["scope"] == "global" and kept["min_keep"] == 0.01 and kept["ratio"] == 0.7
    gone = compose(["recipe=vgg16_cifar10_slim", "granularity=n_m"]).config["granularity"]
    assert set(gone) == {"units", "ratio", "rules", "ratio_file"}


def test_files_of_ones_own_that_spell_all_keys_or_build_on_a_shipped_one(prune, workplace):
    for group, name, text in (
        ("granularity", "spelled", "units: {_target_: prune_cli.granularities.element.Element}\nratio: 0.5\nscope: global\n"),
        ("granularity", "built", "defaults: [filter, _self_]\nratio: 0.25  # of mine\n"),
        ("fit", "slow", "defaults: [default, _self_]\nema: 0.9  # mine\n"),
        ("dataset", "spelled", "_target_: prune_cli.data.digits.digits\nval: 0.2\n"),
    ):  # fmt: skip
        (workplace / "recipes" / group).mkdir(parents=True, exist_ok=True)
        (workplace / "recipes" / group / f"{name}.yaml").write_text(f"# one's own\n{text}")
    keys = ("recipe=quickstart", "fit@train.fit=slow", "dataset=spelled", "train.fit.clip=1.0")
    for granularity in ("spelled", "built"):
        shown = prune("show", *keys, f"granularity={granularity}", "granularity.ratio=0.3")
        assert shown.code == 0, shown.err
    config = yaml.safe_load(shown.out.split("\nrecipe  ")[0])
    assert config["train"]["fit"]["ema"] == 0.9 and config["train"]["fit"]["clip"] == 1.0
    assert config["finetune"]["fit"]["ema"] is None
    assert config["granularity"]["dependency"] == "group" and config["granularity"]["ratio"] == 0.3
    assert "# of mine" in shown.out and "# coupled layers: group" in shown.out and "# mine" in shown.out


def test_an_option_in_place_of_its_keys_is_told_how_to_choose_one(prune):
    result = prune("run", "recipe=quickstart", "train.fit=defualt")
    assert result.code == 2 and "train.fit=defualt: there is no such option; did you mean 'default'" in result.err, (
        result.err
    )
    assert compose(["recipe=quickstart", "train.fit=default"]).config == compose(["recipe=quickstart"]).config


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        (["recipe=quickstart"], set()),
        (["recipe=quickstart", "stages=[train,recalibrate]"], {"recalibrate"}),
        (["recipe=quickstart", "share.epochs=1"], {"share"}),
        (["recipe=digits_stripe_skeleton"], {"skeleton"}),
        (["recipe=mine"], {"sparsify", "skeleton"}),
    ],
)
def test_stages_are_composed_where_a_recipe_or_an_override_names_them(workplace, overrides, stages):
    (workplace / "recipes/recipe").mkdir(parents=True)
    (workplace / "recipes/recipe/mine.yaml").write_text(
        "# @package _global_\ndefaults: [digits_stripe_skeleton]\nsparsify: {epochs: 3}  # not share\n"
    )
    config = compose(overrides).config
    assert {name for name, node in config.items() if isinstance(node, dict) and name in options("stage")} == {
        "train", "prune", "finetune", *stages,
    }  # fmt: skip
    assert all("_target_" in config[stage] for stage in stages)
