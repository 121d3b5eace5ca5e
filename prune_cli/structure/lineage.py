"""What a shrunk network kept of its dense one: indices per axis, attributes, factors and replaced layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from prune_cli.errors import SurgeryError
from prune_cli.layers.replacing import kind_named
from prune_cli.structure.plan import Plan

PARTS = ("kept", "attributes", "scales", "replaced")


@dataclass(frozen=True)
class Replacement:
    """A module that another one replaced.

    Attributes:
        kind: name of the kind, of `layers.replacing.KINDS`.
        data: what the kind needs to build it; plain data.
        inside: what surgery did to it afterwards, by names inside the module that replaces.
    """

    kind: str
    data: Mapping[str, Any]
    inside: Lineage = field(default_factory=lambda: Lineage())


@dataclass(frozen=True)
class Lineage:
    """How a small network descends from the dense one; plain data, ready for JSON or YAML. False where it is that one.

    First tensors are sliced and attributes set, then modules are replaced, those further inside first; what was sliced
    after that is on record in the replacement, so that the same name may mean a tensor before and one after.

    Attributes:
        kept: parameter or buffer name -> axis -> kept indices into the dense network. Axes that keep all are absent.
        attributes: module name -> attribute -> value.
        scales: parameter name -> factor per kept row (axis 0): a change of attention scale folded into the query.
        replaced: module name -> what replaces it.
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    replaced: Mapping[str, Replacement] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, part) for part in PARTS)

    def after(self, first: Lineage) -> Lineage:
        """The lineage of two rounds: `first` led from the dense network to the one that `self` starts from.

        Raises:
            SurgeryError: `self` slices what cannot be sliced (stripes), or replaces a module again.
        """
        inner = {name: self.within(name) for name in first.replaced}
        replaced = {}
        for name, one in first.replaced.items():
            if not inner[name]:
                replaced[name] = one
                continue
            if parts := kind_named(one.kind).closed:
                raise SurgeryError(f"{name} consists of {parts} already; expand the network first (rebuild.expanded)")
            replaced[name] = replace(one, inside=inner[name].after(one.inside))
        for name, one in first.replaced.items():
            parts = kind_named(one.kind).closed
            if parts and any(name.startswith(f"{outer}.") for outer in self.replaced):
                raise SurgeryError(f"{name} consists of {parts}; expand the network first (rebuild.expanded)")
        if again := sorted(set(self.replaced) & set(first.replaced)):
            raise SurgeryError(f"{again[0]} is replaced already; expand the network first (rebuild.expanded)")
        outer = self.without(first.replaced)
        return replace(_composed(outer, first), replaced={**replaced, **outer.replaced})

    def within(self, module: str) -> Lineage:
        """What it says of one module and everything in it, by names inside."""
        before = f"{module}."
        kept, attributes, scales, replaced = (
            {name[len(before) :]: value for name, value in getattr(self, part).items() if name.startswith(before)}
            for part in PARTS
        )
        if module in self.attributes:
            attributes[""] = self.attributes[module]
        return Lineage(kept, attributes, scales, replaced)

    def without(self, modules: Iterable[str]) -> Lineage:
        """What it says of everything else."""
        names = set(modules)
        before = tuple(f"{name}." for name in names)
        parts = (
            {
                name: value
                for name, value in getattr(self, part).items()
                if name not in names and not name.startswith(before)
            }
            for part in PARTS
        )
        return Lineage(*parts)

    def of(self, module: str) -> Lineage:
        """The same, by the names that things inside a module have in the network that holds it."""
        named = {
            part: {f"{module}.{name}" if name else module: value for name, value in getattr(self, part).items()}
            for part in PARTS
        }
        return Lineage(**named)

    def opened(self, module: str, now: Lineage) -> Lineage:
        """The lineage of the same network with a plain module in place of a replaced one.

        Args:
            module: name of a replaced module.
            now: what surgery did to the plain module, by names inside it, since it was replaced.
        """
        rest = replace(self, replaced={name: one for name, one in self.replaced.items() if name != module})
        return now.of(module).after(rest)

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only."""
        return {
            "kept": {n: {str(a): list(map(int, i)) for a, i in axes.items()} for n, axes in self.kept.items()},
            "attributes": {n: dict(values) for n, values in self.attributes.items()},
            "scales": {n: list(values) for n, values in self.scales.items()},
            "replaced": {
                n: {"kind": one.kind, "data": dict(one.data), "inside": one.inside.to_dict() if one.inside else {}}
                for n, one in self.replaced.items()
            },
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Lineage:
        """The inverse of `to_dict`.

        Raises:
            SurgeryError: a key is missing or a value has another form.
        """
        try:
            return Lineage(
                {str(n): {int(a): tuple(map(int, i)) for a, i in axes.items()} for n, axes in data["kept"].items()},
                {str(n): dict(values) for n, values in data["attributes"].items()},
                {str(n): tuple(map(float, values)) for n, values in data["scales"].items()},
                {
                    str(n): Replacement(
                        str(one["kind"]),
                        dict(one["data"]),
                        Lineage.from_dict(one["inside"]) if one["inside"] else Lineage(),
                    )
                    for n, one in data.get("replaced", {}).items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SurgeryError(f"not a lineage ({error!r}); it holds {', '.join(PARTS)}") from error


def _composed(second: Lineage, first: Lineage) -> Lineage:
    """Kept indices, factors and attributes of two rounds, without a thought to what is replaced."""
    kept: dict[str, dict[int, tuple[int, ...]]] = {n: dict(axes) for n, axes in first.kept.items()}
    for name, axes in second.kept.items():
        mine = kept.setdefault(name, {})
        for axis, indices in axes.items():
            old = mine.get(axis)
            mine[axis] = tuple(indices) if old is None else tuple(old[i] for i in indices)
    scales = dict(first.scales)
    for name, factors in scales.items():
        rows = second.kept.get(name, {}).get(0)
        scales[name] = factors if rows is None else tuple(factors[i] for i in rows)
    for name, factors in second.scales.items():
        old_factors = scales.get(name, (1.0,) * len(factors))
        scales[name] = tuple(a * b for a, b in zip(old_factors, factors, strict=True))
    attributes = {name: dict(values) for name, values in first.attributes.items()}
    for name, values in second.attributes.items():
        attributes.setdefault(name, {}).update(values)
    return Lineage(kept, attributes, scales)


@dataclass(frozen=True)
class Shrunk:
    """A small network and where it comes from.

    Attributes:
        model: the new module.
        lineage: kept indices and attribute edits, relative to the network that was shrunk.
        plan: the plan that was followed; it differs from the one asked when an operator could not follow.
        keep: bool per unit id of that plan.
    """

    model: nn.Module
    lineage: Lineage
    plan: Plan
    keep: np.ndarray
