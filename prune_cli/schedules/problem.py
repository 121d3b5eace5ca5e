"""What a schedule knows of the network: its groups of units, what may remain, and what a choice costs; plain data."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from prune_cli.errors import ScheduleError, nearest
from prune_cli.schedules.requests import Kept

Quantity = Literal["units", "params", "macs", "latency_ms"]

SLACK = 1e-3  # a count that is off a whole number by less is rounding of floats


@dataclass(frozen=True)
class Layer:
    """Facts of a layer that loses units.

    Attributes:
        name: dotted module name.
        kind: class of the module, as Conv2d.
        weight: shape of its weight.
        output: shape of its output for one image; empty where it is not called as a module.
        stride: of a convolution, largest over its axes; 1 for others.
        macs: multiply-adds for one image.
        params: weights and biases.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    output: tuple[int, ...]
    stride: int
    macs: int
    params: int


@dataclass(frozen=True)
class Group:
    """Units that compete with each other: the weights of a layer, the filters of a coupled set of layers, ...

    Attributes:
        name: unique; what `Mask.kept` and candidates name.
        layers: that lose these units together.
        units: all of them, also what an earlier stage masked.
        whole: those that there are to choose from.
        least: fewest that may stay (min_keep, max_ratio, round_to); at least 1.
        multiple: the number kept is a multiple of this, or all.
        ratio: fraction of the units that the granularity asks to remove; of a budget, 1.
        depth: place of its first layer among all that can be pruned, from 0.
    """

    name: str
    layers: tuple[Layer, ...]
    units: int
    whole: int
    least: int
    multiple: int
    ratio: float
    depth: int


@dataclass(frozen=True)
class Curve:
    """Milliseconds over the fraction of something that is left; ascending, linear in between."""

    at: tuple[float, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class Arithmetic:
    """Parameters and multiply-adds as products of lengths of axes, which are linear in the units kept.

    A length is fixed + sum over groups of positions * kept / units. That is exact where the units of a group are alike;
    where layers read only a part of a group's channels, it is the mean over all choices of so many.

    Attributes:
        fixed: per axis, positions that stay anyway.
        positions: (axis, group, positions of that group on that axis).
        params, macs: (layer, factor, axes): one term each; layer counts in `layers`.
        layers: names of layers that have terms; empty names for what has none.
        units: per group, all its units.
        times: layer -> milliseconds, where latency is predicted.
        rest: milliseconds that no layer accounts for, over the fraction of all channels that is left.
        channels: (fixed, in groups): channels of the network, for `rest`.
    """

    fixed: tuple[float, ...]
    positions: tuple[tuple[int, int, float], ...]
    params: tuple[tuple[int, float, tuple[int, ...]], ...]
    macs: tuple[tuple[int, float, tuple[int, ...]], ...]
    layers: tuple[str, ...]
    units: tuple[int, ...]
    times: Mapping[str, Curve]
    rest: Curve | None = None
    channels: tuple[int, int] = (0, 0)

    @functools.cached_property
    def _matrix(self) -> np.ndarray:
        found = np.zeros((len(self.fixed), len(self.units)))
        for axis, group, count in self.positions:
            found[axis, group] += count / self.units[group]
        return found

    @functools.cached_property
    def _terms(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        found = {}
        for key, terms in (("params", self.params), ("macs", self.macs)):
            width = max((len(axes) for *_, axes in terms), default=0)
            which = np.full((len(terms), width), len(self.fixed))  # one past the end: a length of 1
            for row, (*_, axes) in enumerate(terms):
                which[row, : len(axes)] = axes
            of_layer = np.array([layer for layer, *_ in terms], dtype=np.int64)
            found[key] = of_layer, np.array([factor for _, factor, _ in terms]), which
        return found

    def total(self, quantity: Literal["params", "macs"], kept: np.ndarray) -> int:
        """Sum over all layers."""
        return math.ceil(float(self._values(quantity, kept).sum()) - SLACK)

    def _values(self, quantity: Literal["params", "macs"], kept: np.ndarray) -> np.ndarray:
        _, factors, which = self._terms[quantity]
        lengths = np.append(np.asarray(self.fixed) + self._matrix @ kept, 1.0)
        return factors * lengths[which].prod(axis=1)

    def milliseconds(self, kept: np.ndarray) -> float:
        """Predicted time for one image."""
        assert self.rest is not None
        everything = np.asarray(self.units, dtype=np.float64)
        parts = {}
        for key in ("params", "macs"):
            of_layer = self._terms[key][0]
            sums = [np.bincount(of_layer, self._values(key, units), len(self.layers)) for units in (kept, everything)]
            parts[key] = sums
        fraction = np.where(
            parts["macs"][1] > 0,
            parts["macs"][0] / np.maximum(parts["macs"][1], 1),
            parts["params"][0] / np.maximum(parts["params"][1], 1),
        )
        index = {name: number for number, name in enumerate(self.layers)}
        width = (self.channels[0] + float(kept.sum())) / max(sum(self.channels), 1)
        total = float(np.interp(width, self.rest.at, self.rest.ms))
        return total + sum(float(np.interp(fraction[index[name]], c.at, c.ms)) for name, c in self.times.items())


@dataclass(frozen=True)
class Problem:
    """What is to be pruned.

    Attributes:
        groups: in the order of the network's parameters.
        quantity: what the target is about: `units` for a granularity with a ratio, else its budget's.
        budget: how much of it may remain; after `Shrink` the same amount as before.
        arithmetic: what choices cost.
        countable: whether `kept` may say how many units stay: not where units are chosen by patterns (N:M).
        shrinks: whether `Shrink` can be asked for.
        tags: snapshots that are there from the start.
        seed: of the stage.
        steps: optimizer steps of an epoch.
        scope: whether units compete inside each group, `layer`, inside each row of one, `row`, or all together, `global`.
        regrows: whether single units can grow from zero: not channels, whose weights get no gradient while all that reads
            them is masked.
        learns: whether the criterion's scores are summed up in training.
    """

    groups: tuple[Group, ...]
    quantity: Quantity
    budget: float
    arithmetic: Arithmetic
    countable: bool
    shrinks: bool
    tags: tuple[str, ...]
    seed: int
    steps: int
    scope: Literal["layer", "row", "global"]
    regrows: bool = True
    learns: bool = False

    @property
    def remains(self) -> float:
        """Fraction of the target's quantity that may remain, in (0, 1]."""
        return min(self.budget / self.cost(self.whole), 1.0) if self.groups else 1.0

    @property
    def whole(self) -> dict[str, int]:
        """Everything stays."""
        return {group.name: group.whole for group in self.groups}

    def group(self, name: str) -> Group:
        """A group by its name.

        Raises:
            ScheduleError: there is none.
        """
        if name not in self._index:
            raise ScheduleError(f"schedule: there is no group of units {name!r}{nearest(name, self._index)}")
        return self.groups[self._index[name]]

    def counts(self, fractions: Mapping[str, float]) -> dict[str, int]:
        """Units that stay for fractions of each group's units that should, in [0, 1]: rounded up to what is legal."""
        kept = self.whole
        for name, fraction in fractions.items():
            group = self.group(name)
            count = max(math.ceil(fraction * group.units - SLACK), group.least)
            kept[name] = min(-(-count // group.multiple) * group.multiple, group.whole)
        return kept

    def cost(self, kept: Kept, quantity: Quantity | None = None) -> float:
        """What is left of the target's quantity, or of another one, by arithmetic alone.

        Args:
            kept: units that stay in each group.
            quantity: `latency_ms` only where the granularity has a budget for it.
        """
        wanted = quantity or self.quantity
        vector = np.array([group.whole for group in self.groups], dtype=np.float64)
        for name, count in kept.items():
            self.group(name)
            vector[self._index[name]] = count
        if wanted == "units":
            return int(vector.sum())
        if wanted == "latency_ms":
            if self.arithmetic.rest is None:
                raise ScheduleError("schedule: latency is predicted only with granularity.budget={latency_ms: ...}")
            return self.arithmetic.milliseconds(vector)
        return self.arithmetic.total(wanted, vector)

    def fraction(self, kept: Kept) -> float:
        """What a choice leaves of the target's quantity, of everything that there is."""
        return self.cost(kept) / max(self.cost(self.whole), 1e-12)

    def masked(self, kept: Kept) -> Problem:
        """What there is to choose from when the others of these groups are masked for good."""
        groups = (replace(group, whole=kept.get(group.name, group.whole)) for group in self.groups)
        return replace(self, groups=tuple(groups))

    def cheapen(self, kept: Kept, group: Group | str, allowed: float) -> dict[str, int] | None:
        """The choice with as few units less of one group alone as bring the cost down to `allowed`.

        Returns:
            None where the group cannot give as much.
        """
        found = self.group(group if isinstance(group, str) else group.name)
        now = kept.get(found.name, found.whole)
        sizes = [size for size in range(found.least, now + 1) if size == now or size % found.multiple == 0]
        low, high = 0, len(sizes) - 1  # the largest size that is cheap enough lies in [low, high], if there is one
        if not sizes or self.cost({**kept, found.name: sizes[0]}) > allowed:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost({**kept, found.name: sizes[middle]}) <= allowed:
                low = middle
            else:
                high = middle - 1
        return {**self.whole, **kept, found.name: sizes[low]}

    def generator(self, name: str) -> np.random.Generator:
        """A source of random numbers for one purpose: of the same name always the same numbers, from the beginning."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {group.name: number for number, group in enumerate(self.groups)}

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Problem:
        """The inverse of `to_dict`, also after a way through JSON.

        Raises:
            KeyError, TypeError: made by other code than this.
        """
        layers = [tuple(_made(Layer, layer) for layer in group["layers"]) for group in data["groups"]]
        groups = tuple(
            _made(Group, {**group, "layers": own}) for group, own in zip(data["groups"], layers, strict=True)
        )
        arithmetic = dict(data["arithmetic"])
        arithmetic["times"] = {name: _made(Curve, curve) for name, curve in arithmetic["times"].items()}
        arithmetic["rest"] = arithmetic["rest"] and _made(Curve, arithmetic["rest"])
        return _made(Problem, {**data, "groups": groups, "arithmetic": _made(Arithmetic, arithmetic)})


def _made(kind: Any, data: Mapping[str, Any]) -> Any:
    """An instance of a dataclass from all its fields; lists become tuples."""
    names = {field.name for field in fields(kind)}
    if set(data) != names:
        raise KeyError(f"{kind.__name__} has the fields {sorted(names)}, not {sorted(data)}")
    return kind(**{name: _frozen(value) for name, value in data.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
