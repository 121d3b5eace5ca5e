"""What a granularity is: groups of units, and what it may declare beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from prune_cli.criteria.criterion import Criterion
from prune_cli.masks import Masks
from prune_cli.measure.storage import MaskFormat
from prune_cli.structure.follow import analyse
from prune_cli.structure.plan import Plan
from prune_cli.structure.prunable import layers

FindPlan = Callable[[], Plan]
"""Gives the channel plan of a network that is analysed once for many choices."""

Dependency = Literal["group", "union_keep", "inner_only"]


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
class Group:
    """Units that compete with each other: the weights of a layer, the filters of a coupled set of layers, ...

    Attributes:
        name: parameter or family name.
        scores: (n,), higher = keep.
        ratio: fraction of the units to remove.
        mask: keep vector (n,) bool -> parameter name -> mask.
        choose: share of the ratio in [0, 1] -> keep vector (n,), where the k lowest of n would be the wrong choice
            (N:M, kernel patterns); None for the k lowest.
        layers: dotted names of the layers that lose these units; empty: that of `name`.
        votes: where layers decide together: a unit goes only when every channel of it is voted out.
        structure: the units in a channel plan, where removing them makes the network smaller.
    """

    name: str
    scores: Tensor
    ratio: float | Fraction
    mask: Callable[[Tensor], dict[str, Tensor]]
    choose: Callable[[Fraction], Tensor] | None = None
    layers: tuple[str, ...] = ()
    votes: tuple[Vote, ...] = ()
    structure: Structure | None = None


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

    @functools.cached_property
    def prunable(self) -> frozenset[str]:
        """Names of all weights that could be asked for."""
        return frozenset(f"{name}.weight" for name in layers(self.model))


class Units(Protocol):
    """One granularity: which weights live or die together."""

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """Refuses combinations that make no sense, with a ConfigError, before anything is trained."""

    def groups(self, context: Context) -> list[Group]:
        """The groups of units with their scores."""


@runtime_checkable
class Coupled(Protocol):
    """Units that span several layers, so that a request for one layer concerns others."""

    def explain(self, context: Context, named: frozenset[str]) -> list[str]:
        """What the network's structure changes about the request, one line each; `named`: weights asked by name."""


@runtime_checkable
class Formed(Protocol):
    """Units whose masks are stored in other ways than weight by weight."""

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, MaskFormat]:
        """How masks are stored, by parameter name; others are stored as single weights."""


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


@runtime_checkable
class Intersection(Protocol):
    """Units whose masks lie in several sets at once, each of which is easy to project onto."""

    def constraints(self, model: nn.Module, ratios: Mapping[str, float | str]) -> tuple[Units, tuple[Constraint, ...]]:
        """Units that choose masks in all sets, and the sets; what depends on weights is that of the network as it is."""


@runtime_checkable
class Silences(Protocol):
    """Units whose masks leave constants behind that must go too, for the masked network to equal the shrunk one."""

    def complete(
        self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None
    ) -> dict[str, Tensor]:
        """The masks with those of the parameters that only serve what is masked; `plan`: see `Context`."""


Ratio = Annotated[float, Field(ge=0, lt=1)]
"""Fraction removed, in [0, 1)."""
