"""Score against cost of all that a search has tried, as one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from prune_cli.files.drawing import svg


class Dot(NamedTuple):
    """A candidate in the plot.

    Attributes:
        cost: in the target's quantity.
        score: percent.
        accepted: by the search.
        best: whether no other candidate beats it in score and cost.
    """

    cost: float
    score: float
    accepted: bool
    best: bool


def plot(dots: Sequence[Dot], quantity: str, budget: float, title: str) -> str:
    """All candidates, those that were accepted, and the front of those that no other beats, with the budget."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for accepted, label, shade in ((False, "tried", 0.35), (True, "accepted", 0.9)):
            mine = [dot for dot in dots if dot.accepted is accepted]
            if mine:
                panel.scatter([d.cost for d in mine], [d.score for d in mine], s=9, alpha=shade, label=label, lw=0)
        best = [dot for dot in dots if dot.best]
        panel.plot(
            [d.cost for d in best], [d.score for d in best], lw=1, marker=".", color="C3", label="best at its cost"
        )
        panel.axvline(budget, lw=1, ls="--", color="0.5", label="budget")
        panel.set_xlabel(quantity)
        panel.set_ylabel("score, percent of held-out images")
        panel.set_title(title)
        panel.grid(alpha=0.3)
        panel.legend()

    return svg((5.2, 3.6), draw)
