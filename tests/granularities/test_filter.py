"""Which filters go: coupled layers that share a score, vote or stay whole, and what is said about the request."""

from __future__ import annotations

import logging

import pytest
import torch
import torchvision
from torch import Tensor, nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule
from prune_cli.structure import follow, surgery

L1 = Criterion(weights.l1)
IMAGE = torch.zeros(1, 3, 8, 8)


class Residual(nn.Module):
    """A stem, one block with an inner layer, and a classifier; stem and `outer` are coupled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.outer(self.inner(x).relu())).relu().mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return Residual()


def scores(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight").detach().abs().flatten(1).sum(1)


def kept(model: nn.Module, granularity: Granularity, criterion: Criterion = L1, **more) -> dict[str, list[int]]:
    masks = select(granularity, criterion, model, IMAGE, **more).masks
    rows = {}
    for name in ("stem", "inner", "outer", "head"):
        weight = model.get_parameter(f"{name}.weight")
        mask = masks.get(f"{name}.weight", torch.ones(())).expand(weight.shape).bool()
        rows[name] = mask.flatten(1).any(1).nonzero().flatten().tolist()
    return rows


def top(values: Tensor, count: int) -> list[int]:
    return sorted(values.argsort(descending=True)[:count].tolist())


@pytest.mark.parametrize(
    ("how", "reducer"),
    [
        ("sum", lambda a, b: a + b),
        ("mean", lambda a, b: (a + b) / 2),
        ("max", torch.maximum),
        ("first", lambda a, b: a),
        ("product", lambda a, b: a * b),
    ],
)
def test_coupled_layers_share_one_score(model, how, reducer):
    rows = kept(model, Granularity(Filter(how), 0.5))
    expected = top(reducer(scores(model, "stem"), scores(model, "outer")), 4)
    assert rows["stem"] == rows["outer"] == expected
    assert rows["inner"] == top(scores(model, "inner"), 3)
    assert rows["head"] == list(range(5))


def test_a_coupled_channel_goes_only_when_both_layers_vote_so(model):
    rows = kept(model, Granularity(Filter(), 0.5, dependency="union_keep"))
    union = sorted({*top(scores(model, "stem"), 4), *top(scores(model, "outer"), 4)})
    assert rows["stem"] == rows["outer"] == union
    assert 4 < len(union) < 8
    assert rows["inner"] == top(scores(model, "inner"), 3)


def test_one_threshold_over_all_channels_with_coupled_ones_counted_in_every_layer(model):
    granularity = Granularity(Filter(), 0.6, scope="global", normalize="none", dependency="union_keep")
    every = torch.cat([scores(model, name) for name in ("stem", "inner", "outer")])
    threshold = every.sort().values[int(0.6 * 22)]
    rows = kept(model, granularity)
    alive = (scores(model, "stem") >= threshold) | (scores(model, "outer") >= threshold)
    assert rows["stem"] == rows["outer"] == alive.nonzero().flatten().tolist()
    inner = (scores(model, "inner") >= threshold).nonzero().flatten().tolist()
    assert rows["inner"] == (inner or top(scores(model, "inner"), 1))


def test_inner_layers_only_and_both_denominators(model):
    chosen = select(Granularity(Filter(), 0.5, scope="global", dependency="inner_only"), L1, model, IMAGE)
    assert (chosen.units, chosen.removed) == (6, 3)
    assert (chosen.channels, chosen.channels_removed) == (22, 3)  # the classifier's outputs never shrink
    rows = kept(model, Granularity(Filter(), 0.5, dependency="inner_only"))
    assert rows["stem"] == rows["outer"] == list(range(8))
    assert rows["inner"] == top(scores(model, "inner"), 3)
    both = select(Granularity(Filter(), 0.5), L1, model, IMAGE)
    assert (both.units, both.removed, both.channels, both.channels_removed) == (14, 7, 22, 11)


@pytest.mark.parametrize("dependency", ["group", "union_keep", "inner_only"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_no_layer_is_emptied_and_nothing_grows_back(model, dependency, scope):
    granularity = Granularity(Filter(), 0.98, scope=scope, dependency=dependency)
    first = select(Granularity(Filter(), 0.4, scope=scope, dependency=dependency), Criterion(weights.random), model,
                   IMAGE)  # fmt: skip
    second = select(granularity, Criterion(weights.random), model, IMAGE, masked=first.masks, seed=5)
    for name, mask in first.masks.items():
        assert not (second.masks[name] & ~mask).any()
    rows = kept(model, granularity)
    assert all(rows.values())


def test_masked_equals_shrunk_for_every_way_of_deciding(model):
    for dependency in ("group", "union_keep", "inner_only"):
        chosen = select(Granularity(Filter(), 0.6, dependency=dependency), L1, model, IMAGE)
        plan = follow.analyse(model, IMAGE)
        keep = plan.everything()
        for name in ("stem", "inner"):
            ids = plan.axes[f"{name}.weight"][0]
            mask = chosen.masks.get(f"{name}.weight", torch.ones(1, 1, 1, 1))
            keep[ids] = mask.expand(len(ids), -1, -1, -1).flatten(1).any(1).numpy()
        small = surgery.remove_units(model, plan, keep).model
        masked = surgery.remove_units(model, plan, plan.everything()).model
        with torch.no_grad():
            for name, mask in chosen.masks.items():
                masked.get_parameter(name).mul_(mask)
        image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(small(image), masked(image), atol=1e-6)


def slimmed(gammas: dict[str, Tensor], percent: float, inner: bool) -> dict[str, Tensor]:
    """Network slimming of ResNet-18 as its authors' threshold has it, with a keep mask per convolution.

    inner: the first convolutions of the blocks only, with a threshold that leaves every layer its best channel;
    else all, where coupled layers keep what any of them keeps.
    """
    among = {name: gamma for name, gamma in gammas.items() if not inner or ("layer" in name and name.endswith("conv1"))}
    ordered = torch.cat(list(among.values())).sort().values
    threshold = ordered[int(percent * len(ordered))]
    if inner:
        threshold = min(threshold, *(gamma.max() for gamma in among.values()))
    keep = {name: gamma >= threshold for name, gamma in among.items()}
    sets = [["conv1", "layer1.0.conv2", "layer1.1.conv2"]]
    sets += [[f"layer{k}.0.conv2", f"layer{k}.1.conv2", f"layer{k}.0.downsample.0"] for k in (2, 3, 4)]
    for members in sets if not inner else []:
        union = torch.stack([keep[name] for name in members]).any(0)
        keep |= dict.fromkeys(members, union)
    return keep


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("percent", [0.0, 0.3, 0.5, 0.7, 0.97])
def test_network_slimming_of_resnet18_in_both_modes(inner, percent):
    network = torchvision.models.resnet18(num_classes=10)
    generator = torch.Generator().manual_seed(int(100 * percent))
    gammas = {
        name: torch.rand(layer.out_channels, generator=generator) * torch.rand(1, generator=generator)
        for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)
    }  # fmt: skip
    gammas["fc"] = torch.zeros(10)
    criterion = Criterion(lambda view: gammas[view.name.removesuffix(".weight")], level="channel")
    how = "inner_only" if inner else "union_keep"
    granularity = Granularity(Filter(), percent, scope="global", dependency=how)
    chosen = select(granularity, criterion, network, torch.zeros(1, 3, 32, 32))
    del gammas["fc"]
    keep = slimmed(gammas, percent, inner)
    assert chosen.channels == sum(map(len, gammas.values())) == 4800
    assert chosen.units == (1920 if inner else 2880)
    gone = 0
    for name in gammas:
        weight = network.get_parameter(f"{name}.weight")
        mask = chosen.masks.get(f"{name}.weight", torch.ones(1, 1, 1, 1, dtype=torch.bool)).expand(weight.shape)
        rows = mask.flatten(1).any(1)
        gone += int((~rows).sum())
        expected = keep.get(name, torch.ones(len(rows), dtype=torch.bool))
        assert torch.equal(rows, expected) or (not expected.any() and int(rows.sum()) == 1)
    assert chosen.channels_removed == gone


def test_widths_are_multiples_with_the_network_whole_where_too_narrow(model):
    rows = kept(model, Granularity(Filter(), 0.4, round_to=4))
    assert (len(rows["stem"]), len(rows["inner"])) == (8, 4)
    rows = kept(model, Granularity(Filter(), 0.5, round_to=7))
    assert (len(rows["stem"]), len(rows["inner"])) == (7, 6)


def explained(model: nn.Module, caplog, granularity: Granularity) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        granularity.check(model, L1, IMAGE)
    return "\n".join(caplog.messages)


def test_what_the_structure_changes_is_said_before_training(model, caplog):
    assert explained(model, caplog, Granularity(Filter())) == ""
    assert explained(model, caplog, Granularity(Filter(), rules=(Rule(types=("default",)),))) == ""
    named = explained(model, caplog, Granularity(Filter(), rules=(Rule(names=("inner", "head")),)))
    assert named == "head: asked for by name, but their outputs cannot shrink; they stay whole"
    two = (Rule(names=("stem",), ratio=0.25), Rule(names=("outer",), ratio=0.5))
    assert "stem, outer: coupled, the smallest of their ratios holds for all: 0.25" in explained(
        model, caplog, Granularity(Filter(), rules=two)
    )
    assert explained(model, caplog, Granularity(Filter(), rules=two, dependency="union_keep")) == ""
    without = (Rule(types=("Conv2d",)), Rule(names=("outer",), exclude=True))
    assert explained(model, caplog, Granularity(Filter(), rules=without)) == (
        "stem: stay whole, as they shrink only together with outer, not asked for"
    )
    assert kept(model, Granularity(Filter(), rules=without))["stem"] == list(range(8))
    rule = (Rule(names_re="stem|outer"),)
    assert "dependency=inner_only" in explained(
        model, caplog, Granularity(Filter(), rules=rule, dependency="inner_only")
    )


def test_the_smallest_ratio_of_coupled_layers_holds(model):
    rules = (Rule(names=("stem",), ratio=0.25), Rule(names=("outer",), ratio=0.5))
    rows = kept(model, Granularity(Filter(), rules=rules))
    assert (len(rows["stem"]), len(rows["outer"]), len(rows["inner"])) == (6, 6, 6)


def test_files_name_layers_too(model, caplog, tmp_path):
    file = tmp_path / "ratios.yaml"
    file.write_text("prune_ratio: {inner.weight: 0.5, head.weight: 0.5, stem.weight: 0.0}")
    assert "head: asked for by name" in explained(model, caplog, Granularity(Filter(), ratio_file=file))


def test_floors_and_caps_are_reported_with_what_was_realised(model, caplog):
    with caplog.at_level(logging.INFO):
        select(Granularity(Filter(), 0.5, max_ratio={"outer": 0.25}), L1, model, IMAGE)
    assert "min_keep and max_ratio acted on stem at 0.250; removed 0.3571 of the units, asked 0.5000" in caplog.text


def test_illegal_choices():
    model = Residual()
    with pytest.raises(ConfigError, match="needs granularity=filter"):
        Granularity(Element(), dependency="union_keep").check(model, L1)
    with pytest.raises(ConfigError, match="no layer 'iner'; did you mean 'inner'"):
        Granularity(Filter(), max_ratio={"iner": 0.5}).check(model, L1)
    short = Criterion(lambda view: view.weight[:, 0, 0, 0][:2], level="channel")
    with pytest.raises(ConfigError, match="shape"):
        select(Granularity(Filter(), rules=(Rule(types=("Conv2d",)),)), short, model, IMAGE)
