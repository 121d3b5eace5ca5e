"""Means and deviations over channels: a norm where they centre or scale the channels, and nothing that may be cut else.

A norm is told by what is computed: the statistic goes, through a square root, a small constant or a change of shape, into a
difference from the channels or a division of them. There the statistic over the channels that are kept is what the small
network computes. Anything else (a gate) would compute another function than the masked network does.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from prune_cli.structure.labels import labelling_of
from prune_cli.structure.operators.call import Call

STATISTICS = {"mean", "var", "std", "var_mean", "std_mean"}
SHAPES = {
    "unsqueeze", "squeeze", "expand", "view", "_unsafe_view", "permute", "transpose", "clone", "_to_copy", "detach",
    "alias", "t", "slice", "select",
}  # fmt: skip
SCALES = {"add", "sub", "mul", "div", "clamp", "clamp_min", "maximum", "sqrt", "pow", "abs", "neg", "rsub", "square"}


class Statistic(NamedTuple):
    """What a tensor without channels says of channels.

    Attributes:
        labels: the channels.
        inverted: whether it is one over a statistic.
    """

    labels: tuple[Tensor, ...]
    inverted: bool = False


def statistic_of(tensor: Tensor) -> Statistic | None:
    """The statistic that a tensor is, if it is one."""
    return getattr(tensor, "_prune_statistic", None)


def followed(call: Call) -> Statistic | None:
    """What an operator makes of the statistics among its inputs; where they serve no norm their channels stay."""
    found = [statistic for tensor in call.inputs if (statistic := statistic_of(tensor))]
    if not found:
        return None
    labels = tuple(label for statistic in found for label in statistic.labels)
    others = [tensor for tensor in call.inputs if statistic_of(tensor) is None]
    inverted = {statistic.inverted for statistic in found}
    if all(tensor.numel() == 1 for tensor in others) and len(inverted) == 1:
        after = _alone(call, inverted.pop())
        if after is not None:
            return Statistic(labels, after)
    elif len(found) == 1 and len(others) == 1 and labelling_of(others[0]).labels and _normalises(call, found[0]):
        return None
    for label in labels:
        call.constraints.freeze(label)
    return None


def _alone(call: Call, inverted: bool) -> bool | None:
    """Whether the result is inverted; None where it is no statistic any more."""
    if call.name in SHAPES:
        return inverted
    exponent = call.args[1] if call.name == "pow" else None
    if call.name in ("rsqrt", "reciprocal") or (isinstance(exponent, (int, float)) and exponent < 0):
        return not inverted
    if call.name == "div" and isinstance(call.args[1], Tensor) and statistic_of(call.args[1]) is not None:
        return None if statistic_of(call.args[0]) is not None else not inverted
    return inverted if call.name in SCALES else None


def _normalises(call: Call, statistic: Statistic) -> bool:
    """Whether channels are centred by the statistic, or divided by it."""
    second = isinstance(call.args[1], Tensor) and statistic_of(call.args[1]) is not None
    if call.name == "sub":
        return second and not statistic.inverted
    if call.name == "div":
        return second and not statistic.inverted
    return call.name == "mul" and statistic.inverted


def labels_in(tensor: Tensor) -> tuple[Tensor, ...]:
    """The channels that a tensor is a statistic of, none where it is none."""
    statistic = statistic_of(tensor)
    return () if statistic is None else statistic.labels
