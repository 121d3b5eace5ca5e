"""Single weights: irregular (unstructured) pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.granularities.units import Context, Group


@dataclass(frozen=True)
class Element:
    """Every weight is a unit of its own; a group is one weight tensor."""

    budgets: ClassVar[tuple[str, ...]] = ("macs", "params")

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """Element units need a score per element and plain ratios."""
        if criterion.level != "element":
            raise ConfigError(
                "granularity=element needs a score per weight, but this criterion scores channels; "
                "choose criterion=l1, l2 or random, or granularity=filter"
            )
        for name, ratio in ratios.items():
            if isinstance(ratio, str):
                raise ConfigError(f"{name}: {ratio!r} is an N:M pattern; granularity=element takes a ratio in [0, 1)")

    def groups(self, context: Context) -> list[Group]:
        """One group per weight tensor."""
        return [_group(context, name, float(ratio)) for name, ratio in context.ratios.items()]


def _group(context: Context, name: str, ratio: float) -> Group:
    scores = context.scores[name]
    if name in context.masked:
        scores = scores.masked_fill(~context.masked[name].to(scores.device).expand(scores.shape), float("-inf"))

    def mask(keep: Tensor) -> dict[str, Tensor]:
        return {name: keep.view(scores.shape)}

    return Group(name, scores.flatten(), ratio, mask)
