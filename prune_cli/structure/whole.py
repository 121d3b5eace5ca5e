"""Why layers stay whole: the first operator of an analysis that fixed their channels, and what would help."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prune_cli.structure.labels import ANY, DECIDES, FIXED, OUTPUTS, Constraints
from prune_cli.structure.plan import Plan

EXPECTED = "these are the network's outputs"
ONE = "its channels are mixed with each other, so all live or none"
HELP = {
    "decides": "an example with which every layer runs, or without the input that decides (a mask), frees them",
    "unknown": "other operators in its place free them (sums, products, index_select); please report it",
    "refused": "sizes that the code takes from x.shape or from attributes of the module, not as numbers, free them",
    "fixed": "",
    "outputs": "",
}


@dataclass(frozen=True)
class Whole:
    """Channels of one parameter that stay, all of them.

    Attributes:
        name: of the parameter that makes them.
        axis: along which they lie.
        channels: how many.
        reason: what fixed them first, in words.
        help: what would free them, empty where nothing is known or nothing should.
        output: whether they are outputs of the network, which always stay.
    """

    name: str
    axis: int
    channels: int
    reason: str
    help: str = ""
    output: bool = False


def whole(plan: Plan, layers: Collection[str] = ()) -> tuple[Whole, ...]:
    """What makes channels of which none can go, in the order of the parameters.

    Args:
        plan: from `analyse`.
        layers: weights of layers, which are named too where something else is computed from them first (a sign, ...).
    """
    if plan.evidence is None:
        return ()
    constraints, axes = plan.evidence
    producing = np.zeros(constraints.count, dtype=bool)
    for array in constraints.producers:
        producing[np.maximum(array, FIXED)] = True
    made = {name for name, axis, start, size in axes if producing[start : start + size].any()}
    fixed = [
        (name, axis, start, size)
        for name, axis, start, size in axes
        if (producing[start] or (axis == 0 and name in layers and name not in made))
        and not plan.variables[start : start + size].any()
    ]
    found = [
        Whole(name, axis, len(plan.axes[name][axis]), ONE)
        for family in plan.families
        if len(family.units) == 1
        for name, axis in family.producers
        if len(plan.axes[name][axis]) > 1
    ]
    if not fixed:
        return tuple(found)
    classes = constraints.components(_without_fixed(constraints.edges))
    first, outputs = _first_fixing(constraints, classes)
    for name, axis, start, size in fixed:
        here = classes[start : start + size]
        origin = int(first[here].min())
        reason, kind = _reason(plan, constraints.origins[origin][2:]) if origin < len(constraints.origins) else ("", "")
        ends = bool(outputs[here].any())
        found.append(Whole(name, axis, size, reason or "coupled with what stays", HELP.get(kind, ""), ends))
    order = {name: index for index, (name, _, _, _) in enumerate(axes)}
    return tuple(sorted(found, key=lambda one: (order[one.name], one.axis)))


def in_words(found: Iterable[Whole]) -> str:
    """The two reasons that keep the most channels, with how many layers each keeps, and what would help."""
    by_reason: dict[tuple[str, str], list[Whole]] = {}
    for one in found:  # the same operator in many layers is one reason
        by_reason.setdefault((one.reason.partition(" in ")[0], one.help), []).append(one)
    most = sorted(by_reason.items(), key=lambda item: -sum(one.channels for one in item[1]))
    parts = []
    for (_, help_), those in most[:2]:
        reason = those[0].reason
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        parts.append(f"{those[0].name}{more} ({reason}{'; ' if help_ else ''}{help_})")
    return ", ".join(parts) + (f", and {len(most) - 2} more reasons" if len(most) > 2 else "")


def _without_fixed(edges: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The equations between variables; what equals a fixed position is left out."""
    return [(np.where(a == FIXED, ANY, a), np.where(b == FIXED, ANY, b)) for a, b in edges]


def _first_fixing(constraints: Constraints, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per class the number of the first operator that fixed it, and whether it reaches the network's outputs."""
    never = len(constraints.origins)
    first = np.full(int(classes.max()) + 1, never)
    outputs = np.zeros(len(first), dtype=bool)
    for origin, array in sorted(_fixings(constraints), key=lambda item: -item[0]):
        touched = classes[array[array > FIXED]]
        first[touched] = origin
        if constraints.origins[origin][2] == OUTPUTS:
            outputs[touched] = True
    return first, outputs


def _fixings(constraints: Constraints) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the operator, variables that it fixes)."""
    if not constraints.origins:
        return
    frozen_from = [origin[1] for origin in constraints.origins]
    edges_from = [origin[0] for origin in constraints.origins]
    for index, array in enumerate(constraints.frozen):
        yield max(bisect_right(frozen_from, index) - 1, 0), array
    for index, (a, b) in enumerate(constraints.edges):
        meets = (a == FIXED) | (b == FIXED)
        if meets.any():
            yield max(bisect_right(edges_from, index) - 1, 0), np.maximum(a, b)[meets]


def _reason(plan: Plan, origin: tuple[str, str]) -> tuple[str, str]:
    name, layer = origin
    if name == OUTPUTS:
        return EXPECTED, "outputs"
    if name == DECIDES:
        return layer, "decides"
    where = f"{name} in {layer or 'the model'}"
    line = next((line for line in plan.refused if line.startswith(f"{where}: ")), "")
    if line:
        return line.removesuffix(": its channels are kept"), "refused"
    unknown = {(func.split(".")[1], at) for trace in plan.traces for func, at in trace.unknown.items() if "." in func}
    if (name, layer) in unknown or (f"{name}_", layer) in unknown:
        return f"{where} is unknown", "unknown"
    return f"{where} needs all of them", "fixed"
