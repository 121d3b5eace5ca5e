"""Every shipped recipe and every shipped option runs: a new file is tested by existing.

What would take long in an option is cut by the overrides in a comment line of its file, `# tiny: schedule.epochs=2`. Which
options go together is in legal.txt (test_legality.py). Here every schedule runs with one granularity; `scripts/test all` runs every
schedule and every criterion with each.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable

import pytest

from prune_cli.config.compose import compose
from prune_cli.config.locations import options
from prune_cli.models import resnet, vgg
from prune_cli.pipeline.build import resolve_steps
from tests.runs.test_legality import GOLDEN, cells

TINY = ("limit_batches=1", "dataset.fake=true", "latency=false", "device=cpu")
LARGE = {name for name in options("recipe") if "imagenet" in name}
HEAVY = {  # many trainings of a large network, or as a lighter one but for its criterion
    "resnet18_cifar10_taylor",
    "resnet56_cifar10_fpgm",
    "resnet56_cifar10_taylor",
    "resnet56_cifar10_stripe_skeleton",
    "resnet50_cifar10_lt_fpgm_kd",
    "resnet50_cifar10_backward_l1_kd",
}
VARIANTS = {  # of another recipe, which their defaults name
    name
    for name, path in options("recipe").items()
    if set(re.findall(r"^  - (\w+)$", path.read_text(), re.M)) & set(options("recipe"))
}
DENSE = {"prune_cli.models.vgg.vgg": vgg.dense_cfg, "prune_cli.models.resnet.resnet": resnet.dense_cfg}
WIDE = [
    name
    for name in options("recipe")
    if re.match("(vgg|resnet(18|34|50|101|152)_)", name) and name not in LARGE | VARIANTS
]
RESNET = (
    "recipe=quickstart",
    "dataset=fake",
    "model=resnet20",
    "model.depth=8",
    "stages=[prune]",
    "granularity.ratio=0.75",
)
LEGAL = [place[1:] for place, legal in cells(GOLDEN.read_text()).items() if legal and place[0] == "prune"]


def tiny(config: dict, choices: dict[str, str]) -> list[str]:
    """The overrides that shorten a composed config: one epoch per stage, few images, and what its options ask for."""
    cut = []
    for place, name in choices.items():
        group, _, node = place.partition("@")
        if name in options(group) and (group != "stage" or node in config["stages"]):
            cut += re.findall(
                r"\S+=\S+", " ".join(re.findall(r"^# tiny: (.+)$", options(group)[name].read_text(), re.M))
            )
    keys = {"epochs": "epochs=1", "batch_size": "batch_size=4", "calibration": "calibration.images=6"}
    return cut + [f"{stage}.{keys[key]}" for stage in set(config["stages"]) for key in keys if key in config[stage]]


def narrow(config: dict) -> list[str]:
    """The override that divides the widths of a network with a cfg by eight, if it is one for small images."""
    model = config["model"]
    dense = DENSE.get(model["_target_"])
    if dense is None or model["cfg"] is not None or config["dataset"].get("image_size", 32) != 32:
        return []
    cfg = [width if width == "M" else narrowed(width) for width in dense(model["depth"])]
    return ["model.cfg=" + json.dumps(cfg).replace('"', "")]


def narrowed(width: int | list[int]) -> int | list[int]:
    return width // 8 if isinstance(width, int) else [one // 8 for one in width]


def shortened(arguments: Iterable[str], *, whole: bool = False) -> list[str]:
    """The arguments, with those that make it one small batch per epoch on a few small images.

    Args:
        whole: whether the network keeps the recipe's widths.
    """
    cut: list[str] = []
    for _ in range(2):  # an option may ask for another, whose line holds too
        composed = compose([*arguments, *cut])
        cut = list(dict.fromkeys(tiny(composed.config, composed.choices)))
    return [*arguments, *cut, *([] if whole else narrow(composed.config)), *TINY]


@pytest.fixture
def short(prune, monkeypatch):
    """Runs a recipe for one small batch per epoch, one epoch per stage, on a few small images."""
    from prune_cli.data.fake import stand_in

    monkeypatch.setitem(stand_in.__kwdefaults__, "sizes", (64, 32))

    def call(*arguments: str, whole: bool = False):
        return prune("run", *shortened(arguments, whole=whole))

    return call


def marked(name: str) -> object:
    """Recipes on real images of the smallest kind run for every commit, those of ImageNet size, heavy ones and variants of
    others only with all tests."""
    marks = pytest.mark.slow if name in LARGE | HEAVY | VARIANTS else () if "digits" in name else pytest.mark.thorough
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", map(marked, options("recipe")))
def test_recipe_runs(short, name):
    """A network for small images is eight times narrower; in its own widths it runs with all tests."""
    ran(short(f"recipe={name}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_recipe_runs_in_its_own_widths(short, name):
    ran(short(f"recipe={name}", whole=True))


def ran(result) -> None:
    assert result.code == 0, result.err
    rows = result.rows
    assert rows.acc1.between(0, 100).all()
    assert (rows.params_nonzero.iloc[-1] < rows.params_nonzero.iloc[0]) or rows.params.iloc[-1] < rows.params.iloc[0]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (not name.endswith("_filter"))) for name in sorted(LARGE)]
)
def test_a_large_recipe_is_built_and_checked(prune, name):
    """As a run does before it trains: data, network, every layer that is asked for, every stage."""
    result = prune("show", *shortened([f"recipe={name}"], whole=True))
    assert result.code == 0, result.err
    assert "imagenet: 1000 classes" in result.out
    assert re.search(r"prune: .*\d+ layers, ", result.out)


@pytest.mark.parametrize("name", sorted(HEAVY | VARIANTS))
def test_keys_and_types_of_what_does_not_run_here_are_right(name):
    composed = compose([f"recipe={name}"])
    steps = resolve_steps(composed.config["stages"], composed.config, composed.choices)
    assert any(step.stage.removes for step in steps) and any(step.epochs != 0 for step in steps)


@pytest.mark.parametrize(("name", "path"), options("recipe").items())
def test_recipe_header_says_what_it_reproduces(name, path):
    text = path.read_text()
    assert text.startswith("# @package _global_\n")
    assert re.search(r"^# reproduces: .{10,}", text, re.M)
    assert re.search(r"^# published: (none known|.*\d.*)", text, re.M)
    assert re.search(rf"^# command: prune run recipe={name}", text, re.M)


@pytest.mark.thorough
@pytest.mark.parametrize("name", options("dataset"))
def test_every_dataset_trains_a_network_without_its_files(short, name):
    result = short("recipe=quickstart", f"dataset={name}", "stages=[train]")
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", options("optimizer"))
def test_every_optimizer(short, name):
    result = short("recipe=quickstart", f"optimizer@finetune.optimizer={name}", "finetune.optimizer.lr=1e-3")
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", options("lr_schedule"))
def test_every_lr_schedule(short, name):
    result = short("recipe=quickstart", f"lr_schedule@train.lr_schedule={name}")
    assert result.code == 0, result.err


def pruned(short, *arguments: str, exactly: bool = True) -> None:
    """A run of the small network removes what was asked; where a schedule may take some of it back, no more."""
    result = short(*RESNET, *arguments)
    assert result.code == 0, result.err
    row = result.rows.loc["prune"]
    low = row.ratio_requested if exactly else 0
    assert low - 0.03 <= row.ratio_prunable <= row.ratio_requested + 0.03 and row.ratio_prunable > 0


def schedules() -> list:
    """Each with the granularities that are legal for it; with filters, or the first, in every run of the tests."""
    found: dict[str, list[str]] = {}
    for schedule, criterion, granularity in LEGAL:
        if criterion == "l1":
            found.setdefault(schedule, []).append(granularity)
    return [
        pytest.param(
            schedule,
            name,
            marks=pytest.mark.thorough if name == ("filter" if "filter" in names else names[0]) else pytest.mark.slow,
        )
        for schedule, names in found.items()
        for name in names
    ]


@pytest.mark.parametrize(("schedule", "granularity"), schedules())
def test_every_schedule_with_every_granularity(short, schedule, granularity):
    pruned(short, f"schedule={schedule}", f"granularity={granularity}", exactly=schedule != "backward")


@pytest.mark.slow
@pytest.mark.parametrize("name", options("criterion"))
def test_every_criterion(short, name):
    """With the first granularity that is legal for it; one that needs another schedule says so in its file."""
    granularity = next((granularity for _, criterion, granularity in LEGAL if criterion == name), "element")
    pruned(short, f"criterion={name}", f"granularity={granularity}")


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "granularity"), [(c, g) for schedule, c, g in LEGAL if schedule == "one_shot"])
def test_every_criterion_with_every_granularity(short, criterion, granularity):
    pruned(short, f"criterion={criterion}", f"granularity={granularity}")


@pytest.mark.parametrize("name", options("distillation"))
def test_every_distillation(short, name):
    result = short("recipe=quickstart", f"distillation={name}")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_the_largest_recipe_is_tried_in_a_minute_of_cpu(prune):
    """What the documents promise of `limit_batches=1`, with the network that has the most weights and multiply-adds."""
    began = time.process_time()
    result = prune("run", "recipe=vgg16_imagenet_patdnn", "limit_batches=1", "dataset.fake=true", "device=cpu")
    assert result.code == 0, result.err
    assert time.process_time() - began < 60
