"""What a schedule may ask of the prune stage.

A schedule is a pure function `(memo, *, its parameters) -> (memo, request)`: called with None first, then with the
memo that it returned, after its request was carried out. Memos are JSON data, so a run resumes between any two steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Memo = dict[str, Any]


@dataclass(frozen=True)
class Mask:
    """Choose masks from the present weights and zero what they remove; what `Split` keeps ends with it.

    Attributes:
        share: how much of the granularity's ratio to apply, in [0, 1].
        monotone: what is masked already stays masked.
    """

    share: float = 1.0
    monotone: bool = True


@dataclass(frozen=True)
class Split:
    """Renew, for every constraint set of the granularity, the projection Z of W + U and the scaled dual U += W - Z.

    The first one begins with U = 0 and makes Z alone. See `prune_cli/admm.py`.

    Attributes:
        rho: weight of the penalty in the training that follows.
    """

    rho: float


@dataclass(frozen=True)
class Train:
    """Train on to a point of the stage's own training time.

    Attributes:
        until: epoch to reach.
        of: epochs of the whole stage, to which the learning-rate schedule refers.
        enforce: keep masked weights at zero (hard); else they may grow again (soft).
        pull: add the penalty rho / 2 * ||W - Z + U||^2 of the last `Split`.
    """

    until: int
    of: int
    enforce: bool = True
    pull: bool = False


@dataclass(frozen=True)
class Done:
    """The schedule is complete."""


Request = Mask | Split | Train | Done
