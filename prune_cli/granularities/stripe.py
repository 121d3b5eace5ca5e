"""Stripes: one position of one filter over all its input channels, W[n, :, i, j] (Meng et al., arXiv:2009.14410)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion
from prune_cli.granularities import storage
from prune_cli.granularities.allot import Group
from prune_cli.granularities.granularity import Context
from prune_cli.granularities.spatial import check_scores, fitting, many_positions
from prune_cli.granularities.storage import Storage

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

    def storage(self, mask: Tensor, shape: Sequence[int], asked: float | str, bits: int = 32) -> Storage:
        """Bytes of one weight: the kept stripes' values and one bit per stripe; other layers as single weights."""
        if len(shape) > 2 and shape[2:] != (1,) * (len(shape) - 2):
            return storage.stripe(mask, shape, bits)
        return storage.element(mask, shape, bits)


def _group(context: Context, name: str, ratio: float) -> Group:
    scores = context.scores[name]
    pooled = scores.sum(1)
    if name in context.masked:
        alive = context.masked[name].to(scores.device).expand(scores.shape).any(1)
        pooled = pooled.masked_fill(~alive, float("-inf"))

    def mask(keep: Tensor) -> dict[str, Tensor]:
        return {name: keep.view(pooled.shape).unsqueeze(1)}

    return Group(name, pooled.flatten(), ratio, mask)
