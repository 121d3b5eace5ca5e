"""How a search stands: candidates a second, the best so far, how much of what it may try is spent."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from prune_cli.progress import Shown

log = logging.getLogger(__name__)

QUIET = 10.0  # least seconds between two lines in the log


class Tally:
    """Counts the candidates of a stage, over all its requests.

    Args:
        stage: its name.

    Attributes:
        total: candidates that the schedule will score at most; None where it does not say.
        done: candidates so far, also of earlier runs of the stage.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self.total: int | None = None
        self.done = 0
        self._run = 0
        self._best: tuple[float, float] | None = None
        self._began: float | None = None
        self._told = time.monotonic()

    def known(self, scores: Sequence[float | None], costs: Sequence[float]) -> None:
        """Takes what an earlier run of the stage, or arithmetic, has found out."""
        self.done += len(scores)
        self._take(scores, costs)

    def begin(self) -> None:
        """The first candidate begins now, if none has."""
        self._began = time.monotonic() if self._began is None else self._began

    def tell(self, scores: Sequence[float], costs: Sequence[float], bar: Shown) -> None:
        """Takes new scores, in percent, and the fraction of the whole cost that each candidate leaves."""
        self.done, self._run = self.done + len(scores), self._run + len(scores)
        self._take(scores, costs)
        facts = self.facts(time.monotonic())
        bar.update(self.done, facts)
        if time.monotonic() - self._told >= QUIET:
            self._told = time.monotonic()
            log.info("%s: %s", self._stage, "  ".join(facts))

    def facts(self, now: float) -> list[str]:
        """What is shown, most important first."""
        spent = f"candidate {self.done}" + (f" of {self.total}" if self.total else "")
        rate = self._run / max(now - (now if self._began is None else self._began), 1e-9)
        speed = f"{rate:.3g} a second" if rate >= 1 else f"{60 * rate:.3g} a minute"
        best = [] if self._best is None else [f"best {self._best[0]:.2f} % at {self._best[1]:.3f} of the cost"]
        return [spent, *best, speed]

    def _take(self, scores: Sequence[float | None], costs: Sequence[float]) -> None:
        for score, cost in zip(scores, costs, strict=True):
            if score is not None and (self._best is None or (score, -cost) > (self._best[0], -self._best[1])):
                self._best = score, cost
