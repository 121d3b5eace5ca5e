"""A granularity of one's own in one file: units, what they declare, and how their masks are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from prune_cli.config.nodes import resolve
from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.units import Constraint, Context, Group, Units
from prune_cli.measure.storage import Format, MaskFormat, Storage, stored
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select

L1 = Criterion(weights.l1)
IMAGE = torch.zeros(1, 2, 6, 6)


def _bytes(mask: Tensor, shape: tuple[int, ...], bits: int = 32) -> Storage:
    kept = int(mask.any(3).sum())
    return Storage(kept * shape[3] * bits // 8, bitmaps=-(-math.prod(shape[:3]) // 8))


ROWS = Format("rows", _bytes)


@dataclass(frozen=True)
class Rows(Units):
    """Rows of kernels, W[n, c, i, :]."""

    name: ClassVar[str] = "rows"
    budgets: ClassVar[tuple[str, ...]] = ("params",)

    def groups(self, context: Context) -> list[Group]:
        return [
            _group(context, name, float(ratio)) for name, ratio in context.ratios.items() if _is_conv(context, name)
        ]

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, MaskFormat]:
        return {name: MaskFormat(f"{__name__}.ROWS") for name in ratios if model.get_parameter(name).dim() == 4}


class Bare:
    """Inherits from nothing and knows nothing but its groups."""

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None: ...

    def groups(self, context: Context) -> list[Group]:
        return Rows().groups(context)


def _is_conv(context: Context, name: str) -> bool:
    return context.model.get_parameter(name).dim() == 4


def _group(context: Context, name: str, ratio: float) -> Group:
    pooled = context.pooled(name, 3, 3)
    return Group(name, pooled.flatten(), ratio, lambda keep: {name: keep.view(pooled.shape).unsqueeze(3)})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("units", [Rows(), Bare()])
def test_exactly_the_lowest_rows_go(units):
    model, granularity = network(), Granularity(units, 0.5)
    granularity.check(model, L1, IMAGE)
    found = select(granularity, L1, model, IMAGE)
    assert set(found.masks) == {"0.weight", "2.weight"}
    for name, mask in found.masks.items():
        sums = model.get_parameter(name).abs().sum(3)
        assert torch.equal(mask.squeeze(3), sums > sums.flatten().sort().values[sums.numel() // 2 - 1])
    again = select(granularity, L1, model, IMAGE, masked={"0.weight": ~found.masks["0.weight"]})
    assert torch.equal(again.masks["0.weight"], ~found.masks["0.weight"])  # what is masked already ranks lowest


def test_what_units_declare_is_checked_and_used():
    model = network()
    channels = Criterion(weights.fpgm, "channel")
    with pytest.raises(ConfigError, match="granularity=rows needs a score per weight"):
        Granularity(Rows()).check(model, channels)
    with pytest.raises(ConfigError, match="does not work with rows units; this granularity takes params"):
        Granularity(Rows(), budget=Budget(macs=0.5)).check(model, L1)
    with pytest.raises(ConfigError, match="can only be masked"):
        Granularity(Rows(), shrink=True).check(model, L1)
    found = select(Granularity(Rows(), budget=Budget(params=0.6)), L1, model, IMAGE)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gone = sum(int((~mask).sum()) * 3 for mask in found.masks.values())
    assert parameters - gone <= 0.6 * parameters < parameters - gone + 3 * len(found.masks)


@pytest.mark.parametrize("units", [Rows(), Bare()])
def test_what_it_does_not_say_is_as_for_single_weights(units):
    model, granularity = network(), Granularity(units)
    masks = {"0.weight": torch.ones(4, 2, 3, 1, dtype=torch.bool)}
    assert granularity.complete(model, IMAGE, masks) == masks
    whole, sets = granularity.split(model)
    assert whole == granularity and sets == (Constraint("units", granularity.units),)
    assert not granularity.units.coupled and not granularity.units.shrinks


def test_a_class_that_inherits_nothing_can_do_what_it_has_methods_for():
    class Talking(Bare):
        def explain(self, context: Context, named: frozenset[str]) -> list[str]:
            return ["all layers are one"]

    units = Granularity(Talking()).units
    assert units.coupled and units.explain(None, frozenset()) == ["all layers are one"]


def test_its_own_format_counts_its_bytes():
    model, granularity = network(), Granularity(Rows(), 0.5)
    masks = select(granularity, L1, model, IMAGE).masks
    form = granularity.forms(model, masks)["2.weight"]
    assert stored(form, masks["2.weight"], (4, 4, 3, 3)) == ("rows", Storage(24 * 3 * 4, bitmaps=6))
    assert stored(MaskFormat("gone.ROWS"), masks["2.weight"], (4, 4, 3, 3))[0] == "element"  # its module is not loaded


def test_an_option_file_names_it_by_its_target():
    node = {"units": {"_target_": f"{__name__}.Rows"}, "ratio": 0.25}
    assert resolve(node, "granularity", Granularity).units == Rows()
