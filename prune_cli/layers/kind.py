"""What every kind of replaced layer answers: how it is built, opened up again, sliced, stored and counted.

A kind is one object in one file of this package, and one line in `replacing.KINDS`. It replaces a module of a network
(a convolution, a block) by another one that computes the same, or what is left of it. Two sorts of kinds exist:

- *closed* ones keep weights of their own that cannot be sliced or chosen from (single stripes): a stage that chooses
  weights works on the plain layer, which `expand` gives, and the choice is placed again afterwards;
- *open* ones consist of ordinary layers (a rotation around a convolution, a block behind a gate), which are pruned where
  they are. What surgery does inside is recorded relative to the replaced module (`structure.lineage.Replacement`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from prune_cli.masks import Masks

Data = Mapping[str, Any]
"""What a replacement needs besides the module it replaces: numbers, text, true, false, null, and lists of them."""

Axis = tuple[str, int]
"""Name of a parameter inside a module, and an axis of it."""


@dataclass(frozen=True)
class Stored:
    """How a tensor of a replaced layer is stored.

    Attributes:
        format: name for the tables.
        bits: of a bitmap that says as much as the tensor; None where its values themselves are stored.
    """

    format: str
    bits: int | None = None


@dataclass(frozen=True)
class Expanded:
    """The plain module in place of a replaced one.

    Attributes:
        module: computes what the replaced one does, under `masks`.
        masks: name inside `module` -> bool tensor, True = keep.
        axes: axis inside the replaced module -> the axis of `module` that was sliced with it: the outer axes of a
            composite. What was kept along others leaves no trace in the plain module.
        attributes: numbers of `module` that follow from its size, as `out_channels`.
        inner: dotted name under which the replaced module holds the plain one as it is (a block behind a gate); all
            that surgery did inside it stays on record then. None where the plain module is a new one.
    """

    module: nn.Module
    masks: Masks = field(default_factory=dict)
    axes: Mapping[Axis, Axis] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    inner: str | None = None


class Kind(Protocol):
    """One kind of replaced layer."""

    @property
    def closed(self) -> str:
        """What such a layer consists of, where its weights cannot be sliced or chosen from; empty for an open kind."""

    def build(self, dense: nn.Module, data: Data) -> nn.Module:
        """The module that replaces another; its weights follow from those of `dense` where they can.

        Args:
            dense: the module as it is before, sliced already; it may be used up.
            data: may come from a file: everything in it is checked.

        Raises:
            SurgeryError: `dense` is no module that can be replaced so, or the data do not fit it.
        """

    def expand(self, layer: nn.Module, masks: Masks) -> Expanded:
        """The plain module of a replaced one.

        Args:
            layer: left as it was.
            masks: name inside `layer` -> bool tensor, True = keep.
        """

    def masks_left(self, layer: nn.Module, masks: Masks) -> dict[str, Tensor]:
        """Masks by names inside the plain module (of the size that was replaced) as masks by names inside `layer`."""

    def out_width(self, layer: nn.Module) -> int | None:
        """Outputs of a layer that multiplies by a `weight` of its own, as a convolution does; None where inner layers do."""

    def stored(self, layer: nn.Module) -> dict[str, Stored]:
        """Tensors of the layer's own that are stored in a form of this kind; any other by its values."""
