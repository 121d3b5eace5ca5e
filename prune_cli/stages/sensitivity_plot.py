"""The points of a sensitivity analysis, and their curves as one SVG; the same points give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prune_cli.files.drawing import svg

COLUMNS = 4


@dataclass(frozen=True)
class Point:
    """A line of sensitivity.csv.

    Attributes:
        layer: the group of units that was pruned alone: a parameter, or the first layer of a coupled set.
        criterion: what chose its units.
        ratio: fraction removed, as asked; 0 is the network as it came.
        ratio_realised: fraction removed of the layer's units.
        acc1: percent of the split.
        loss: mean cross entropy on the split.
    """

    layer: str
    criterion: str
    ratio: float
    ratio_realised: float
    acc1: float
    loss: float


def curves(points: Sequence[Point], title: str) -> str:
    """One panel per layer, accuracy over the ratio removed, one line per criterion.

    Args:
        points: by criterion, layer and rising ratio.
    """
    layers = list(dict.fromkeys(point.layer for point in points))
    criteria = list(dict.fromkeys(point.criterion for point in points))
    columns = min(COLUMNS, len(layers))
    rows = -(-len(layers) // columns)

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for panel, layer in zip(panels.flat, layers, strict=False):
            for criterion in criteria:
                mine = [point for point in points if (point.layer, point.criterion) == (layer, criterion)]
                panel.plot([p.ratio_realised for p in mine], [p.acc1 for p in mine], marker=".", label=criterion)
            panel.set_title(layer, fontsize=8)
            panel.grid(alpha=0.3)
        for panel in panels.flat[len(layers) :]:
            panel.set_visible(False)
        figure.suptitle(title)
        figure.supxlabel("fraction of the layer's units removed")
        figure.supylabel("acc1, percent")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(criteria))

    return svg((2.6 * columns, 1.8 * rows + 0.8), draw)
