"""Which units of a plan stay: counts and lowest scores per family."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from prune_cli.errors import SurgeryError
from prune_cli.structure.plan import Plan

# ---------------------------------------------------------------------------------------------- choosing


def removed(ratio: float | str | Fraction, n: int) -> int:
    """How many of n units a ratio removes: `int(ratio * n)` in exact arithmetic.

    Raises:
        SurgeryError: the ratio is not in [0, 1].
    """
    exact = ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))
    if not 0 <= exact <= 1:
        raise SurgeryError(f"ratio {ratio} is not a fraction removed; give a value from 0 to 1")
    return int(exact * n)


def lowest(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k lowest scores; equal scores go by index, lowest first."""
    return np.argsort(scores, kind="stable")[:k]


def lowest_units(
    plan: Plan, scores: np.ndarray | None = None, ratio: float | Mapping[str, float] = 0.5, min_keep: int = 1
) -> np.ndarray:
    """Removes the lowest-scored fraction of every family.

    Args:
        plan: from `analyse`.
        scores: one score per unit id (higher = keep), length `plan.size`; None removes the first units.
        ratio: fraction removed, in [0, 1], or one per family name (families that are not named keep everything).
        min_keep: units that stay in every family, at least 1.

    Returns:
        `keep`: bool per unit id.

    Raises:
        SurgeryError: a ratio out of range, or scores of another length or not finite.
    """
    values = np.arange(plan.size, dtype=np.float64) if scores is None else np.asarray(scores, dtype=np.float64)
    if values.shape != (plan.size,):
        raise SurgeryError(f"scores have shape {values.shape}; give one score per unit id, {plan.size} in all")
    if np.isnan(values[1:]).any():
        raise SurgeryError("scores hold nan; give finite numbers (higher = keep)")
    keep = plan.everything()
    for family in plan.families:
        fraction = ratio.get(family.name, 0.0) if isinstance(ratio, Mapping) else ratio
        n = len(family.units)
        k = min(removed(fraction, n), max(n - max(min_keep, 1), 0))
        keep[family.units[lowest(values[family.units], k)]] = False
    return spared(plan, keep, values)


def spared(plan: Plan, keep: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The same choice with the best unit of every axis that would be empty: layers may read a part of a family.

    Args:
        plan: from `analyse`.
        keep: bool per unit id.
        scores: one per unit id, higher = keep.
    """
    present = keep.copy()
    present[0] = True
    for ids in {id(ids): ids for axes in plan.axes.values() for ids in axes.values()}.values():
        if not present[ids].any():
            present[ids[np.argmax(scores[ids])]] = True
    return present
