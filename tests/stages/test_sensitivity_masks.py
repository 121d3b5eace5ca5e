"""What sensitivity measures is what pruning makes: its masks against those of a prune stage of that layer alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prune_cli.config.compose import compose
from prune_cli.config.locations import options
from prune_cli.console import Console
from prune_cli.pipeline.build import build
from prune_cli.pipeline.state import State
from prune_cli.pipeline.store import Store
from prune_cli.selection.targets import Rule
from prune_cli.stages.prune import prune as prune_stage
from prune_cli.stages.sensitivity import candidates
from prune_cli.structure.prunable import owner

NET = (
    "recipe=quickstart", "model=resnet20", "model.depth=8", "model.widths=[4,8,8]", "dataset=fake", "device=cpu",
    "latency=false",
)  # fmt: skip
RATIOS = {"n_m": (0.5, 0.75), "pattern": (0.6, 0.75)}
OTHERS = (0.4, 0.95)  # the second empties whole filters of stripes


def posed(place: Path, stage: str, *overrides: str) -> tuple[State, dict]:
    """The state that enters a pipeline of one stage, and the parameters of that stage."""
    composed = compose([*NET, f"stages=[{stage}]", *overrides])
    built = build(composed.config, composed.choices, Console(), Store(place))
    (step,) = built.steps
    return built.state.evolve(slot=Store(place).slot("k"), stage=stage), dict(step.parameters)


@pytest.mark.parametrize(
    ("granularity", "more"),
    [
        *((name, ()) for name in options("granularity")),
        ("filter", ("granularity.dependency=union_keep",)),
        ("filter", ("granularity.dependency=inner_only", "granularity.min_keep=0.3")),
        ("element", ("granularity.scope=row", "criterion=l2")),
        ("pattern", ("granularity.units.pattern_set=fixed5",)),
        ("stripe", ("granularity.max_ratio=0.5",)),
        ("kernel", ("granularity.scope=global", "granularity.round_to=3")),
    ],
)
def test_masks_are_those_of_pruning_the_layer_alone(workplace, granularity, more):
    ratios, chosen = RATIOS.get(granularity, OTHERS), (f"granularity={granularity}", *more)
    grid = f"sensitivity.ratios=[{','.join(map(str, ratios))}]"
    state, bound = posed(workplace, "sensitivity", *chosen, grid, "sensitivity.split=test")
    _, pruning = posed(workplace, "prune", *chosen, f"granularity.ratio={ratios[0]}")
    found = list(candidates(bound["granularity"], bound["criterion"], state, ratios, bound["calibration"]))
    assert {candidate.ratio for candidate in found} == set(ratios)
    assert len({(candidate.layer, candidate.ratio) for candidate in found}) == len(found) >= 2 * 3
    shapes = {name: parameter.shape for name, parameter in state.model.named_parameters()}
    for index, candidate in enumerate(found):
        alone = replace(
            pruning["granularity"],
            ratio=candidate.ratio,
            rules=(Rule(names=tuple(map(owner, candidate.members))),),
            scope="row" if pruning["granularity"].scope == "row" else "layer",
            shrink=False,
        )
        fresh = state.evolve(model=copy.deepcopy(state.model), slot=Store(workplace).slot(str(index)))
        pruned = prune_stage(fresh, **pruning | {"granularity": alone})
        full, expected = (
            {name: mask.expand(shapes[name]) for name, mask in masks.items() if not mask.all()}
            for masks in (candidate.masks, pruned.masks)
        )
        assert full.keys() == expected.keys()
        assert all(torch.equal(full[name], mask) for name, mask in expected.items()), candidate.layer
        assert candidate.ratio_realised == pytest.approx(pruned.outcome.ratio_prunable)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("granularity=n_m", "sensitivity.ratios=[0.25,0.6]"), "sensitivity.ratios: 0.6 cannot be pruned"),
        (("granularity=pattern", "sensitivity.ratios=[0.5,0.75]"), "sensitivity.ratios: 0.5 cannot be pruned"),
        (("granularity=element", "criterion=fpgm"), "granularity=element needs a score per weight"),
    ],
)
def test_the_whole_grid_is_checked_before_training(prune, overrides, message):
    result = prune("run", *NET, "stages=[train,sensitivity]", "sensitivity.split=test", *overrides)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1
