"""Single weights: irregular (unstructured) pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from prune_cli.granularities.units import Context, Group, Normalize, Rows, Units
from prune_cli.structure.prunable import target


@dataclass(frozen=True)
class Element(Units):
    """Every weight is a unit of its own; a group is one weight tensor."""

    name: ClassVar[str] = "element"
    budgets: ClassVar[tuple[str, ...]] = ("macs", "params")
    has_rows: ClassVar[bool] = True
    compared: ClassVar[Normalize] = "none"

    def groups(self, context: Context) -> list[Group]:
        """One group per weight tensor."""
        return [_group(context, name, float(ratio)) for name, ratio in context.ratios.items()]


def _group(context: Context, name: str, ratio: float) -> Group:
    scores = context.scores_of(name)

    def mask(keep: Tensor) -> dict[str, Tensor]:
        return {name: keep.view(scores.shape)}

    return Group(
        name, scores.flatten(), ratio, mask, rows=output_rows(target(context.model, name).module, scores.shape)
    )


def output_rows(module: nn.Module, shape: torch.Size) -> Rows:
    """The positions in a flattened weight by output channel: in a row everything that one output is made of.

    Args:
        module: the layer.
        shape: of its weight; of a transposed convolution (in_channels, out_channels / groups, ...).
    """
    parts = module.groups if isinstance(module, _ConvTransposeNd) else 1
    outputs = parts * shape[1] if isinstance(module, _ConvTransposeNd) else shape[0]

    def positions() -> Tensor:
        flat = torch.arange(shape.numel())
        if not isinstance(module, _ConvTransposeNd):
            return flat.view(outputs, -1)
        return flat.view(parts, shape[0] // parts, shape[1], -1).transpose(1, 2).reshape(outputs, -1)

    return Rows(outputs, positions)
