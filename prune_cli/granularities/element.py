"""Single weights: irregular (unstructured) pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prune_cli.granularities.units import Context, Group, Units


@dataclass(frozen=True)
class Element(Units):
    """Every weight is a unit of its own; a group is one weight tensor."""

    name: ClassVar[str] = "element"
    budgets: ClassVar[tuple[str, ...]] = ("macs", "params")

    def groups(self, context: Context) -> list[Group]:
        """One group per weight tensor."""
        return [_group(context, name, float(ratio)) for name, ratio in context.ratios.items()]


def _group(context: Context, name: str, ratio: float) -> Group:
    scores = context.scores_of(name)

    def mask(keep: Tensor) -> dict[str, Tensor]:
        return {name: keep.view(scores.shape)}

    return Group(name, scores.flatten(), ratio, mask)
