"""Stripes: one position of one filter over all its input channels, W[n, :, i, j] (Meng et al., arXiv:2009.14410)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion
from prune_cli.granularities.allot import Group
from prune_cli.granularities.granularity import Context
from prune_cli.granularities.spatial import check_scores, fitting, many_positions
from prune_cli.granularities.storage import Form
from prune_cli.granularities.targets import layers

NEEDS = "a convolution with kernels larger than 1x1 (a 1x1 stripe is a whole filter)"


@dataclass(frozen=True)
class Stripe:
    """Every stripe is a unit; the stripes of a whole layer compete, not those of each filter.

    A stripe's score is the sum over its input channels: with criterion=l1 its L1 norm, with l2 its squared L2 norm.
    Linear and 1x1 layers stay dense, or are refused where they were chosen by name.
    """

    budgets: ClassVar[tuple[str, ...]] = ("macs", "params")

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """Stripes need scores per element and kernels larger than 1x1."""
        check_scores("stripe", ratios, criterion)
        fitting(model, ratios, many_positions, "stripe", NEEDS)

    def groups(self, context: Context) -> list[Group]:
        """One group per convolution."""
        asked = fitting(context.model, context.ratios, many_positions, "stripe", NEEDS)
        return [_group(context, name, ratio) for name, ratio in asked.items()]

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, Form]:
        """The kept stripes' values and one bit per stripe."""
        return {f"{name}.weight": Form("stripe") for name, module in layers(model).items() if many_positions(module)}


def _group(context: Context, name: str, ratio: float) -> Group:
    scores = context.scores[name]
    pooled = scores.sum(1)
    if name in context.masked:
        alive = context.masked[name].to(scores.device).expand(scores.shape).any(1)
        pooled = pooled.masked_fill(~alive, float("-inf"))

    def mask(keep: Tensor) -> dict[str, Tensor]:
        return {name: keep.view(pooled.shape).unsqueeze(1)}

    return Group(name, pooled.flatten(), ratio, mask)
