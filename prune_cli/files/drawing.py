"""Plots as SVG: the same numbers give the same bytes, whatever the user's own settings of matplotlib are."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

SETTINGS = {"svg.hashsalt": "prune", "svg.fonttype": "none", "font.size": 8.0, "font.family": "sans-serif"}


def svg(size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """The text of an SVG.

    Args:
        size: width and height in inches.
        draw: draws on a figure of matplotlib, which has to be installed.
    """
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", SETTINGS]):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
