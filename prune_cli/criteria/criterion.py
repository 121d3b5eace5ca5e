"""What every criterion is given and what it must say of itself. The criteria are in the files beside this one.

A criterion names in `needs` what it reads besides the weights: names of the table in `needs.py`, or entries of one's own.
Then it is known without running anything whether it is legal, and `statistics.collect` measures exactly that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from prune_cli.criteria.needs import Need, Source, find

At = Literal["post_act", "pre_norm"]
"""Where outputs are measured: where the channel's norm and activation end, or at the layer itself."""

Norms = Literal["running", "batch"]
"""Whose mean and variance batch norms divide by while something is measured: their own, or those of the images."""


@dataclass(frozen=True)
class Norm:
    """The norm that normalises a layer's outputs: one scale and one shift per channel; detached, None where absent."""

    scale: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True)
class LayerView:
    """One layer as a criterion sees it.

    Attributes:
        name: parameter name of the weight.
        weight: (out_channels, ...) or (out_features, in_features), transposed convolutions (in_channels,
            out_channels, ...); detached.
        bias: (out_channels,) or None.
        generator: source of randomness of this layer, on the CPU.
        statistics: what the criterion's `needs` collected, by name.
        n_keep: channels that will be kept, for criteria that need `n_keep`; else None.
        norm: for criteria that need `norm`: the norm that follows, None where there is none; else None.
        axis: axis of the weight along which its output channels lie.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    generator: torch.Generator
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    n_keep: int | None = None
    norm: Norm | None = None
    axis: int = 0

    @property
    def filters(self) -> Tensor:
        """The weight as one row per output channel: (channels, everything else)."""
        return self.weight.movedim(self.axis, 0).flatten(1)


Score = Callable[[LayerView], Tensor]
"""LayerView -> scores, higher = keep."""

Function = TypeVar("Function", bound=Score)

NATURE = "__nature__"


@dataclass(frozen=True, kw_only=True)
class Nature:
    """What a score function says of its numbers, and the decorator that attaches it to the function.

    Attributes:
        power: they are magnitudes to this power, |w| = 1 and w ** 2 = 2, so that what is defined for magnitudes (lamp) can
            be computed from them; None where they are something else.
        drawn: they are drawn, and mean nothing: a unit of any size gets one number of its own, because the sum over its
            weights would rank units by their size.
    """

    power: int | None = None
    drawn: bool = False

    def __call__(self, function: Function) -> Function:
        """Attaches it to a score function, as a decorator."""
        setattr(function, NATURE, self)
        return function


@dataclass(frozen=True)
class Criterion:
    """A criterion option.

    Attributes:
        score: layerView -> scores, higher = keep; shaped like the weight for `element`, (channels,) for `channel`.
            Element scores pool to coarser units by summation, unless they are drawn; see `Nature`.
        level: what one score stands for.
        needs: what `score` reads besides weight, bias and generator: names in `needs.NEEDS`, or entries of one's own.
        at: where outputs are measured, for the needs that are about outputs.
        norms: what batch norms divide by meanwhile; `batch` is for networks before training, whose own statistics are of
            nothing yet.
    """

    score: Score
    level: Literal["element", "channel"] = "element"
    needs: tuple[Need | str, ...] = ()
    at: At = "post_act"
    norms: Norms = "running"

    def __post_init__(self) -> None:
        for need in self.needs:
            find(need)

    @property
    def entries(self) -> tuple[Need, ...]:
        """What `needs` names."""
        return tuple(find(need) for need in self.needs)

    @property
    def nature(self) -> Nature:
        """What the score function says of its numbers."""
        return getattr(getattr(self.score, "func", self.score), NATURE, None) or Nature()

    def reads(self, *sources: Source) -> bool:
        """Whether any of the needs comes from one of the sources."""
        return any(need.source in sources for need in self.entries)
