"""What a shrunk network kept of its dense one: indices per axis, attributes and factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prune_cli.errors import SurgeryError


@dataclass(frozen=True)
class Lineage:
    """How a small network descends from the dense one; plain data, ready for JSON or YAML.

    Attributes:
        kept: parameter or buffer name -> axis -> kept indices into the dense network. Axes that keep all are absent.
        attributes: module name -> attribute -> value.
        scales: parameter name -> factor per kept row (axis 0): a change of attention scale folded into the query.
        stripes: name of a convolution -> the stripes it is left with, in the numbers of its kept filters
        (stripe_conv.StripeConv2d).
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    stripes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def after(self, first: Lineage) -> Lineage:
        """The lineage of two rounds: `first` led from the dense network to the one that `self` starts
        from.

        Raises:
            SurgeryError: `self` changes a convolution that has stripes; only a plain one can be sliced.
        """
        sliced = {name.rpartition(".")[0] for name in self.kept} | set(self.stripes)
        if both := sorted(sliced & set(first.stripes)):
            raise SurgeryError(
                f"{both[0]} consists of stripes already; expand the network first (stripe_conv.expanded)"
            )
        kept: dict[str, dict[int, tuple[int, ...]]] = {n: dict(axes) for n, axes in first.kept.items()}
        for name, axes in self.kept.items():
            mine = kept.setdefault(name, {})
            for axis, indices in axes.items():
                old = mine.get(axis)
                mine[axis] = tuple(indices) if old is None else tuple(old[i] for i in indices)
        scales = dict(first.scales)
        for name, factors in scales.items():
            rows = self.kept.get(name, {}).get(0)
            scales[name] = factors if rows is None else tuple(factors[i] for i in rows)
        for name, factors in self.scales.items():
            old_factors = scales.get(name, (1.0,) * len(factors))
            scales[name] = tuple(a * b for a, b in zip(old_factors, factors, strict=True))
        attributes = {name: dict(values) for name, values in first.attributes.items()}
        for name, values in self.attributes.items():
            attributes.setdefault(name, {}).update(values)
        return Lineage(kept, attributes, scales, {**first.stripes, **self.stripes})

    def without_stripes(self) -> Lineage:
        """The lineage of the same network with plain convolutions (stripe_conv.expanded)."""
        return replace(self, stripes={})

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only."""
        return {
            "kept": {n: {str(a): list(map(int, i)) for a, i in axes.items()} for n, axes in self.kept.items()},
            "attributes": {n: dict(values) for n, values in self.attributes.items()},
            "scales": {n: list(values) for n, values in self.scales.items()},
            "stripes": {n: list(map(int, numbers)) for n, numbers in self.stripes.items()},
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
                {str(n): tuple(map(int, numbers)) for n, numbers in data.get("stripes", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SurgeryError(f"not a lineage ({error!r}); it holds kept, attributes, scales, stripes") from error
