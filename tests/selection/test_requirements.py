"""What is legal is known before anything is trained; every shipped option scores a real network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prune_cli.config.compose import compose
from prune_cli.config.locations import options
from prune_cli.config.nodes import resolve
from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import collect
from prune_cli.errors import ConfigError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.requirements import check, needs_images
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule
from tests.criteria.test_weights import Residual

IMAGE = torch.zeros(1, 3, 8, 8)
CHANNEL = {"fpgm", "bn_scale", "taylor_group", "taylor_gate", "apoz", "mean_activation", "hrank", "clustering"}


class Images:
    def __init__(self, train: int = 10) -> None:
        self.sizes = {"train": train, "test": 3} if train else {"test": 3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def option(name: str) -> Criterion:
    config = compose(["recipe=quickstart", f"criterion={name}"]).config["criterion"]
    return resolve(config, "criterion", Criterion)


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


@pytest.mark.parametrize("name", options("criterion"))
def test_every_option_chooses_filters_and_weights(name):
    criterion, model = option(name), network()
    assert (criterion.level == "channel") == (name in CHANNEL)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(6, 3, 8, 8, generator=generator), torch.arange(6) % 4)]
    statistics = collect(model, batches, criterion.needs, loss, IMAGE, at=criterion.at)
    for weight, found in statistics.items():  # what only a stage that trains sums up
        found["movement"] = torch.randn(model.get_parameter(weight).shape, generator=generator)
    for units in (Filter(), Element()):
        granularity = Granularity(units, 0.5)
        if isinstance(units, Element) and criterion.level == "channel":
            with pytest.raises(ConfigError, match="choose criterion="):
                granularity.check(model, criterion)
            continue
        granularity.check(model, criterion)
        check(criterion, granularity, model, Images(), IMAGE, trained=True)
        chosen = select(granularity, criterion, model, IMAGE, statistics=statistics)
        assert chosen.removed == (7 if isinstance(units, Filter) else (216 + 432 + 24) // 2)


def test_criteria_that_measure_need_images():
    granularity = Granularity(Filter())
    for name in options("criterion"):
        criterion = option(name)
        free = name in {"l1", "l2", "random", "fpgm", "bn_scale", "clustering", "synflow", "movement"}
        assert needs_images(criterion) == (not free)
        if free:
            check(criterion, granularity, network(), Images(0), IMAGE, trained=True)
        else:
            with pytest.raises(ConfigError, match="no training split; choose"):
                check(criterion, granularity, network(), Images(0), IMAGE)


@pytest.mark.parametrize("name", ["bn_scale", "taylor_gate"])
def test_norms_must_be_behind_every_family_that_is_ranked(name):
    with pytest.raises(ConfigError, match=r"needs a norm behind every layer, but .*stem\.weight"):
        check(option(name), Granularity(Filter()), Residual(), Images(), IMAGE)
    mixed = nn.Sequential(network()[:6], nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    with pytest.raises(ConfigError, match=r"but 1\.weight has none; exclude"):
        check(option(name), Granularity(Filter()), mixed, Images(), IMAGE)
    rules = (Rule(types=("default",)), Rule(names=("1",), exclude=True))
    check(option(name), Granularity(Filter(), rules=rules), mixed, Images(), IMAGE)
    check(option(name), Granularity(Filter()), network(), Images(), IMAGE)  # the classifier is never ranked


def test_one_norm_in_a_coupled_family_is_enough():
    class Shortcut(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inside = nn.BatchNorm2d(8), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            x = x + self.outer(self.inside(self.inner(x)).relu())
            return self.head(x.relu().mean((2, 3)))

    check(option("bn_scale"), Granularity(Filter()), Shortcut(), Images(), IMAGE)  # would raise, as without any norm


def test_clustering_needs_counts_that_do_not_depend_on_scores():
    with pytest.raises(ConfigError, match=r"choose granularity\.scope=layer"):
        check(option("clustering"), Granularity(Filter(), scope="global"), network(), Images(), IMAGE)
    with pytest.raises(ConfigError, match=r"granularity\.budget finds out.*choose"):
        check(option("clustering"), Granularity(Filter(), budget=Budget(macs=0.5)), network(), Images(), IMAGE)


def test_layers_that_do_not_run_have_no_activations():
    model = network()
    model.add_module("spare", nn.Linear(3, 3))
    model.forward = lambda x: nn.Sequential(*list(model)[:9])(x)
    with pytest.raises(ConfigError, match=r"activations of spare\.weight.*exclude"):
        check(option("apoz"), Granularity(Filter()), model, Images(), IMAGE)
    rules = (Rule(types=("default",)), Rule(names=("spare",), exclude=True))
    check(option("apoz"), Granularity(Filter(), rules=rules), model, Images(), IMAGE)
    check(option("taylor"), Granularity(Filter()), model, Images(), IMAGE)


def test_flow_that_runs_backwards_is_known_early_but_weights_that_are_still_0_are_no_reason():
    class Falling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).neg().exp().mean((2, 3)))

    with pytest.raises(ConfigError, match="is negative; choose"):
        check(option("synflow"), Granularity(Element()), Falling(), Images(), IMAGE)
    model = network()
    nn.init.zeros_(model[8].weight)
    check(option("synflow"), Granularity(Element()), model, Images(), IMAGE)


def test_a_choice_without_the_statistics_says_which():
    with pytest.raises(ConfigError, match=r"needs the statistic 'taylor' of 0\.weight"):
        select(Granularity(Filter()), option("taylor"), network(), IMAGE)
    assert select(Granularity(Filter()), Criterion(weights.l1), network(), IMAGE).removed == 7


def test_refused_from_the_command_line_before_training(prune):
    result = prune("run", "recipe=quickstart", "criterion=bn_scale", "granularity=filter", "latency=false")
    assert result.code == 2
    assert "needs a norm behind every layer, but conv1.weight, conv2.weight, fc1.weight has none" in result.err
    result = prune("run", "recipe=quickstart", "criterion=obd", "prune.calibration.images=0")
    assert result.code == 2
    assert "prune.calibration.images" in result.err
    result = prune("run", "recipe=quickstart", "criterion=apoz", "granularity=filter", "criterion.at=later")
    assert result.code == 2
    assert "criterion.at" in result.err and "pre_norm" in result.err
