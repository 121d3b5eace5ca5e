"""What one execution of the dense network leaves behind: its operators, and what was learned on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prune_cli.structure.labels import Labelling
from prune_cli.structure.reads import Origin

FROZEN_LEVEL = 4  # above what any rule knows: the operator's labels stay


class Step(NamedTuple):
    """One executed operator: what the small network is compared with."""

    name: str
    func: Any
    layer: str
    outs: tuple[tuple[tuple[int, ...], Labelling], ...]
    source: tuple[tuple[int, ...], Labelling] | None = None  # of operators that pick positions or normalise
    norm: bool = False  # takes a statistic over channels by which they are normalised
    code: str = ""  # class of the module, "" for single layers
    scalar: float | None = None  # a number among the operands
    numbers: tuple[Any, ...] = ()  # its other numbers, which must stay what they are
    dtypes: tuple[torch.dtype, ...] = ()  # of the outputs


class Use(NamedTuple):
    """A place where an operator took a size from an attribute.

    Attributes:
        origin: the attribute.
        label: what the size counts; None where it counts no channels.
        axis: along which axis of the label.
    """

    origin: Origin
    label: Tensor | None
    axis: int = 0


class Look(NamedTuple):
    """A place where code asked for values that depend on the input.

    Attributes:
        layer: dotted name of the module that runs.
        name: the operator.
        answer: `condition` (a bool), `number` (any other, or an array) or `rows` (a tensor whose size depends on values).
    """

    layer: str
    name: str
    answer: str


@dataclass(slots=True)
class Cut:
    """A view in an attention module that cut channels into heads: which sizes the module's attributes may
    name."""

    layer: str
    sizes: tuple[int, ...]
    label: Tensor


@dataclass(slots=True)
class Trace:
    """One execution of the dense network.

    Attributes:
        kind: 0 in evaluation, 1 in training mode, from 2 on in evaluation with one condition answered the other way.
        values: by number of the operator, what the small network is to find where code looks at values; None of a run
            without arithmetic.
        flips: which condition was answered the other way; -1 none.
        outputs: the shapes of what the model returned.
    """

    kind: int
    steps: list[Step] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    widths: list[tuple[str, tuple[int, ...], Tensor]] = field(default_factory=list)
    splits: list[tuple[str, tuple[Tensor, ...]]] = field(default_factory=list)  # layer, labels of the parts of an axis
    uses: list[Use] = field(default_factory=list)  # sizes that were attributes
    flows: set[tuple[str, str]] = field(
        default_factory=set
    )  # module, attribute: a size of channels is reckoned from it
    touched: set[tuple[int, str, Origin]] = field(default_factory=set)  # before which operator, in which layer
    looks: list[Look] = field(default_factory=list)
    values: dict[int, Any] | None = None
    arrays: list[Any] = field(default_factory=list)  # what numpy and lists were given, in order
    flips: int = -1
    unknown: dict[str, str] = field(default_factory=dict)
    literal: bool = False  # whether some operator took a size that the code may spell out
    trains: bool = False  # whether a module's own code asked if it is being trained

    @property
    def training(self) -> bool:
        """Whether containers were in training mode."""
        return self.kind == 1


@dataclass(frozen=True, slots=True)
class Fallbacks:
    """What earlier checks have taught.

    Attributes:
        levels: (kind of the trace, number of the operator) -> how much its rule fixes.
        tied: code of attention modules that derive their head size from the width of their input.
        compared: (module, attribute) that the code reads near an operator that failed while they did not follow.
        dropped: the same, of those whose following did not help.
        training: whether training mode is analysed too, whatever evaluation reaches.
        unscaled: whether factors that attention derives from its width must stay, since the rows of its queries did not
            undo a change; but for layers whose code is known.
        whole: whether everything is kept, since no part was found that can shrink.
    """

    levels: Mapping[tuple[int, int], int] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    compared: frozenset[tuple[str, str]] = frozenset()
    dropped: frozenset[tuple[str, str]] = frozenset()
    training: bool = False
    unscaled: bool = False
    whole: bool = False
