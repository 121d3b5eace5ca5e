"""Which options go together: the table that is computed equals the one in legal.txt, cell by cell.

After a change that is meant: `prune list --legal > tests/runs/legal.txt`, and read the difference.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prune_cli.config.locations import options
from prune_cli.pipeline.legality import render, table

GOLDEN = Path(__file__).with_name("legal.txt")


def cells(text: str) -> dict[tuple[str, str, str, str], bool]:
    """The table by (stages, schedule, row, column), from what is printed."""
    found = {}
    for block in text.strip().split("\n\n"):
        head, columns, *rows = block.splitlines()
        stages, _, schedules = head.partition(", schedule=")
        for row in rows:
            name, *marks = row.split()
            assert set(marks) <= {"yes", "."}, row
            for column, mark in zip(columns.split(), marks, strict=True):
                for schedule in schedules.split(","):
                    assert (stages, schedule, name, column) not in found
                    found[stages, schedule, name, column] = mark == "yes"
    return found


@pytest.fixture(scope="module")
def asked():
    return table()


def test_every_combination_is_as_legal_as_the_golden_table_says(asked):
    golden, computed = cells(GOLDEN.read_text()), cells(render(asked))
    differing = [
        f"{' '.join(filter(None, place))}: legal is {computed.get(place)}, and was {golden.get(place)}"
        for place in sorted(golden.keys() | computed.keys())
        if golden.get(place) != computed.get(place)
    ]
    assert not differing, "\n".join([*differing, "why: prune list --legal --why", __doc__])
    assert render(asked) == GOLDEN.read_text()


def test_every_option_and_every_stage_that_uses_one_is_asked(asked):
    for axis in ("criterion", "granularity", "schedule", "regulariser"):
        assert {cell.options[axis] for cell in asked if axis in cell.options} == set(options(axis))
    assert {stage for cell in asked for stage in cell.stages} >= {
        "prune",
        "sensitivity",
        "permute",
        "sr_ste",
        "skeleton",
    }
    pruning = [cell for cell in asked if cell.stages == ("prune",)]
    assert len(pruning) == len(options("criterion")) * len(options("granularity")) * len(options("schedule"))


def test_every_option_goes_with_something(asked):
    for axis in ("criterion", "granularity", "schedule", "regulariser"):
        legal = {cell.options[axis] for cell in asked if axis in cell.options and not cell.refusal}
        assert set(options(axis)) == legal


def test_a_refusal_is_one_line_that_says_what_would_be_right(asked):
    for cell in asked:
        if cell.refusal:
            assert "\n" not in cell.refusal
            assert re.search("choose|needs|give|exclude", cell.refusal), cell


@pytest.mark.parametrize(
    ("keys", "legal"),
    [
        (("recipe=quickstart",), True),
        (("recipe=quickstart", "criterion=wanda", "granularity=n_m", "schedule=iterative"), False),  # ratio 0.8
        (("recipe=quickstart", "criterion=wanda", "granularity=n_m", "granularity.ratio=0.75"), True),
        (("recipe=quickstart", "criterion=fpgm"), False),
        (("recipe=quickstart", "criterion=fpgm", "granularity=filter"), True),
        (("recipe=quickstart", "criterion=taylor_gate", "granularity=filter"), False),  # LeNet-5 has no norms
        (("recipe=digits_admm", "criterion=movement"), False),
    ],
)
def test_the_table_says_what_a_run_says(prune, keys, legal):
    composed = prune("show", *keys, "stages=[prune]", "device=cpu")
    assert (composed.code == 0) == legal, composed.err
    chosen = {"criterion": "l1", "granularity": "element", "schedule": "one_shot", "stage": "prune"}
    if "recipe=digits_admm" in keys:
        chosen |= {"granularity": "pattern", "schedule": "admm"}
    chosen |= dict(key.split("=") for key in keys)
    listed = prune("list", "--legal", "--why", *(f"{key}={value}" for key, value in chosen.items()), "device=cpu")
    assert listed.code == 0, listed.err
    grid, why = listed.out.splitlines()[:3], listed.out.splitlines()[3:]
    assert list(cells("\n".join(grid)).values()) == [legal]
    assert legal or why[0].endswith(composed.err.strip().removeprefix("error: "))


@pytest.mark.parametrize("granularity", ["element", "n_m", "pattern"])
def test_what_a_recipe_sets_holds_for_other_options_as_in_a_run(prune, granularity):
    """quickstart asks for 80 %, which is no whole number of 4."""
    listed = prune("list", "--legal", "recipe=quickstart", "criterion=l1", "schedule=one_shot", "stage=prune")
    legal = {column: legal for (*_, column), legal in cells(listed.out).items()}
    run = prune("show", "recipe=quickstart", "stages=[prune]", f"granularity={granularity}")
    assert legal[granularity] == (run.code == 0)
    assert not legal["n_m"] and legal["element"]


def test_a_key_is_set_wherever_an_option_has_it(prune):
    result = prune(
        "list", "--legal", "criterion=movement", "stage=prune", "schedule.start=1", "granularity=element,filter"
    )
    assert result.code == 0, result.err
    found = cells(result.out)
    first = {schedule for (_, schedule, _, _), legal in found.items() if legal}
    assert "iterative" in first and "one_shot" not in first  # movement is summed up in training, which must come first
    without = cells(prune("list", "--legal", "criterion=movement", "stage=prune", "granularity=element,filter").out)
    assert {schedule for (_, schedule, _, _), legal in without.items() if legal} == first - {"iterative"}


def test_a_key_of_a_shared_file_is_set_too(prune):
    """Clustering needs to know how many filters stay, which a ranking over the whole network finds out from scores."""
    arguments = ("list", "--legal", "criterion=l1,clustering", "stage=prune", "granularity=filter", "schedule=one_shot")
    legal = [list(cells(prune(*arguments, *key).out).values()) for key in [(), ("granularity.scope=global",)]]
    assert legal == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("criterion=wand",), "did you mean 'wanda'"),
        (("stage=train",), "no stage among train uses"),
        (("stage=permute", "criterion=l1"), "no stage among permute uses criterion"),
        (("bogus=3",), "bogus: unknown key"),
    ],
)
def test_mistakes_are_named(prune, workplace, arguments, message):
    result = prune("list", "--legal", *arguments)
    assert result.code == 2
    assert message in result.err
    assert not list(workplace.iterdir())
