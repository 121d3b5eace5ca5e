"""What a granularity is: groups of units, and what it may declare beside them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import ConfigError
from prune_cli.masks import Masks
from prune_cli.measure.storage import MaskFormat
from prune_cli.structure.follow import analyse
from prune_cli.structure.lineage import Shrunk
from prune_cli.structure.plan import Plan
from prune_cli.structure.prunable import bare, targets

FindPlan = Callable[[], Plan]
"""Gives the channel plan of a network that is analysed once for many choices."""

Dependency = Literal["group", "union_keep", "inner_only"]

Normalize = Literal["none", "layer_mean", "layer_l2", "lamp", "per_cost"]
"""What scores are divided by before they are compared with those of other layers; see `selection.ranking.normalized`, and
`selection.per_cost` for what a unit holds of its layers per multiply-add that it saves."""


@dataclass(frozen=True)
class Vote:
    """What one of several coupled layers says about the units of a group.

    Attributes:
        layer: dotted module name.
        units: (m,) index in the group of the unit that each of the layer's channels belongs to.
        scores: (m,), higher = keep.
        ratio: fraction of the layer's channels that it votes to remove.
    """

    layer: str
    units: Tensor
    scores: Tensor
    ratio: float


@dataclass(frozen=True)
class Structure:
    """Where the units of a group are in a channel plan: `units` holds one unit id per unit of the group."""

    plan: Plan
    units: np.ndarray


@dataclass(frozen=True)
class Rows:
    """The units of a group by the output channel that they serve.

    Attributes:
        count: rows, each of equally many units.
        positions: gives the units of every row by their index in the group: (count, n / count).
    """

    count: int
    positions: Callable[[], Tensor]


@dataclass(frozen=True)
class Group:
    """Units that compete with each other: the weights of a layer, the filters of a coupled set of layers, ...

    Attributes:
        name: parameter or family name.
        scores: (n,), higher = keep.
        ratio: fraction of the units to remove.
        mask: keep vector (n,) bool -> parameter name -> mask.
        choose: fraction of the ratio in [0, 1] -> keep vector (n,), where the k lowest of n would be the wrong choice
            (N:M, kernel patterns); None for the k lowest.
        layers: dotted names of the layers that lose these units; empty: that of `name`.
        votes: where layers decide together: a unit goes only when every channel of it is voted out.
        structure: the units in a channel plan, where removing them makes the network smaller.
        rows: the output rows inside which units can compete; None where they cannot.
        lines: in how many sets of equally many units they compete: 1, or the rows under scope=row.
        comparable: scores of all groups compare as they are, so nothing normalises them.
        parts: gives (members, n): what the units are to each layer that they run through, producers and consumers; None
            where units lie in one layer.
    """

    name: str
    scores: Tensor
    ratio: float | Fraction
    mask: Callable[[Tensor], dict[str, Tensor]]
    choose: Callable[[Fraction], Tensor] | None = None
    layers: tuple[str, ...] = ()
    votes: tuple[Vote, ...] = ()
    structure: Structure | None = None
    rows: Rows | None = None
    lines: int = 1
    comparable: bool = False
    parts: Callable[[], Tensor] | None = None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Dotted names of the layers that lose these units."""
        return self.layers or (self.name.removesuffix(".weight"),)


@dataclass(frozen=True)
class Context:
    """What a granularity needs to form its groups.

    Attributes:
        model: the network.
        example_inputs: one image, for granularities that analyse shapes.
        scores: parameter name -> element scores shaped like the weight, or (out_channels,) channel scores.
        ratios: parameter name -> ratio asked, or an `mXnY` pattern.
        masked: masks that hold already and stay (their units rank lowest), or empty.
        dependency: how coupled layers decide together, for granularities whose units are coupled.
        find_plan: gives the network's channel plan, where somebody keeps it; see `plan`.
    """

    model: nn.Module
    example_inputs: Tensor
    scores: Mapping[str, Tensor]
    ratios: Mapping[str, float | str]
    masked: Masks
    dependency: Dependency = "group"
    find_plan: FindPlan | None = None

    @functools.cached_property
    def plan(self) -> Plan:
        """The channel plan of the network, analysed where nobody keeps it."""
        return self.find_plan() if self.find_plan else analyse(self.model, self.example_inputs)

    def scores_of(self, name: str) -> Tensor:
        """Element scores of one weight, shaped like it; -inf for what is masked already, so that it ranks lowest."""
        scores = self.scores[name]
        alive = self._alive(name, scores)
        return scores if alive is None else scores.masked_fill(~alive, float("-inf"))

    def pooled(self, name: str, first: int, last: int) -> Tensor:
        """Element scores of one weight summed over axes `first` to `last`; -inf where masks left nothing of a unit."""
        scores = self.scores[name]
        pooled, alive = scores.flatten(first, last).sum(first), self._alive(name, scores)
        return pooled if alive is None else pooled.masked_fill(~alive.flatten(first, last).any(first), float("-inf"))

    def _alive(self, name: str, scores: Tensor) -> Tensor | None:
        """The mask that one weight has already, None without one."""
        return self.masked[name].to(scores.device).expand(scores.shape) if name in self.masked else None

    @functools.cached_property
    def prunable(self) -> frozenset[str]:
        """Names of all weights that could be asked for."""
        return frozenset(targets(self.model))

    @functools.cached_property
    def bare(self) -> dict[str, tuple[int, ...]]:
        """Parameters that make channels without being a layer's weight, and the axes along which those lie."""
        return bare(self.model, self.plan)


class Units:
    """One granularity: which weights live or die together.

    A granularity says what it can do in the class variables, writes `groups`, and of the other methods those that do
    something for it. A class of one's own that does not inherit from this one works too; see `adopted`.

    Attributes:
        name: what to write behind `granularity=`.
        level: the coarsest scores that do: `element` = a score per weight, `channel` = scores of channels too.
        takes_patterns: whether a ratio may be an N:M pattern, `m4n2`.
        budgets: quantities of `selection.budget.Budget` that can choose how many units go.
        coupled: whether units span several layers, so that a request for one layer concerns others.
        shrinks: whether units can be taken out of a network, not only masked.
        compared: what makes scores of different layers comparable where a recipe does not say (scope=global).
        has_parts: whether units run through several layers: groups then have `parts`.
        has_rows: whether units can compete inside each output row (scope=row): groups then have `rows`.
        asks_bare: whether parameters that make channels without being a layer's weight are asked for too.
    """

    name: ClassVar[str] = ""
    level: ClassVar[Literal["element", "channel"]] = "element"
    takes_patterns: ClassVar[bool] = False
    budgets: ClassVar[tuple[str, ...]] = ()
    coupled: ClassVar[bool] = False
    shrinks: ClassVar[bool] = False
    has_rows: ClassVar[bool] = False
    compared: ClassVar[Normalize] = "layer_mean"
    has_parts: ClassVar[bool] = False
    asks_bare: ClassVar[bool] = False

    def groups(self, context: Context) -> list[Group]:
        """The groups of units with their scores."""
        raise NotImplementedError(f"{type(self).__name__} forms no groups")

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """Refuses what makes no sense beyond what is declared, with a ConfigError, before anything is trained."""

    def explain(self, context: Context, named: frozenset[str]) -> list[str]:
        """What the network's structure changes about the request, one line each; `named`: weights asked by name."""
        return []

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, MaskFormat]:
        """How masks are stored, by parameter name; others are stored as single weights."""
        return {}

    def constraints(self, model: nn.Module, ratios: Mapping[str, float | str]) -> tuple[Units, tuple[Constraint, ...]]:
        """The sets in which masks lie, each easy to project onto, and units that choose masks in all of them.

        What depends on weights is that of the network as it is.
        """
        return self, (Constraint("units", self),)

    def complete(
        self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None
    ) -> dict[str, Tensor]:
        """The masks with those of what they leave useless, for the masked network to equal the shrunk one.

        Args:
            plan: see `Context`.
        """
        return dict(masks)

    def shrink(self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None) -> Shrunk:
        """The network without the units that the masks remove.

        Args:
            plan: see `Context`.
        """
        raise NotImplementedError(f"{type(self).__name__} can only be masked")


@dataclass(frozen=True)
class Constraint:
    """One of the sets that masked weights must lie in; ADMM projects onto each by itself.

    Attributes:
        name: for tables.
        units: whose masks are the projection.
        criterion: whose scores choose them, where only a certain one's do; None = the run's.
    """

    name: str
    units: Units
    criterion: Criterion | None = None


def adopted(units: Any) -> Units:
    """Units of a class that does not inherit from `Units`: the same object's copy, with the base's answers for the rest.

    It can do what it has methods for: explain makes it coupled, shrink lets it shrink.
    """
    if isinstance(units, Units):
        return units
    kind = type(units)
    can = {"name": kind.__name__.lower(), "coupled": hasattr(kind, "explain"), "shrinks": hasattr(kind, "shrink")}
    found = copy.copy(units)
    object.__setattr__(found, "__class__", type(kind.__name__, (kind, Units), can | {"__module__": kind.__module__}))
    assert isinstance(found, Units)
    return found


def check_declared(units: Units, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
    """Refuses scores and ratios that the units do not take, by what they declare.

    Raises:
        ConfigError: says what would be legal.
    """
    if units.level == "element" and criterion.level != "element":
        raise ConfigError(
            f"granularity={units.name} needs a score per weight, but this criterion scores channels; choose "
            "criterion=l1, l2 or random, or granularity=filter"
        )
    if units.takes_patterns:
        return
    for name, ratio in ratios.items():
        if isinstance(ratio, str):
            raise ConfigError(f"{name}: {ratio!r} is an N:M pattern; granularity={units.name} takes a ratio in [0, 1)")


Ratio = Annotated[float, Field(ge=0, lt=1)]
"""Fraction removed, in [0, 1)."""
