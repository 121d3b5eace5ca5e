"""Kernels: the connection of one input channel to one output channel, W[n, c] (connectivity in arXiv:2001.00138)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion
from prune_cli.granularities.spatial import many_positions, with_such_units
from prune_cli.granularities.units import Context, Group, Units
from prune_cli.measure.storage import MaskFormat
from prune_cli.structure.prunable import targets

NEEDS = "a convolution with kernels larger than 1x1 (a 1x1 kernel is a single weight)"


@dataclass(frozen=True)
class Kernel(Units):
    """Every two-dimensional kernel is a unit; the kernels of a layer compete.

    A kernel's score is the sum over its positions: with criterion=l2 its squared L2 norm, which ranks as PatDNN's
    connectivity pruning does. Linear and 1x1 layers stay dense, or are refused where they were chosen by name.
    """

    name: ClassVar[str] = "kernel"
    budgets: ClassVar[tuple[str, ...]] = ("macs", "params")

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """Kernels larger than 1x1 must be there."""
        with_such_units(model, ratios, many_positions, self.name, NEEDS)

    def groups(self, context: Context) -> list[Group]:
        """One group per convolution."""
        asked = with_such_units(context.model, context.ratios, many_positions, self.name, NEEDS)
        return [group(context, name, ratio) for name, ratio in asked.items()]

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, MaskFormat]:
        """The kept kernels' values and one bit per kernel."""
        return {name: MaskFormat("kernel") for name, target in targets(model).items() if many_positions(target.module)}


def group(context: Context, name: str, ratio: float | Fraction) -> Group:
    """The kernels of one convolution, each with the sum of its scores.

    Args:
        ratio: fraction of the kernels to remove.
    """
    pooled = context.pooled(name, 2, -1)
    inside = context.scores[name].dim() - 2

    def mask(keep: Tensor) -> dict[str, Tensor]:
        return {name: keep.view(*pooled.shape, *[1] * inside)}

    return Group(name, pooled.flatten(), ratio, mask)
