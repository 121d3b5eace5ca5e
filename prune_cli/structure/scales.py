"""Factors that attention derives from its width (1 / sqrt of a head's), which the rows of its queries undo.

Which rows make the queries, and that the factor meets nothing else, is known of torch's own layers. Of others it is a
guess by names and shapes, which is tried out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from prune_cli.errors import SurgeryError
from prune_cli.structure import attention, reference
from prune_cli.structure.modules import named_tensors, walk
from prune_cli.structure.plan import Plan
from prune_cli.structure.rebuild import rescale
from prune_cli.structure.slicing import cut, kept_indices


def factors(dense: nn.Module, small: nn.Module, changes: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
    """Factors of the queries' rows that undo the change of a factor.

    Args:
        dense: the dense network.
        small: the small one.
        changes: attention layer -> the new factor over the old one.

    Returns:
        Parameter name -> a factor per row.
    """
    found: dict[str, tuple[float, ...]] = {}
    if not changes:
        return found
    named = named_tensors(small)
    for name, module in walk(dense):
        projection = attention.query_projection(module) if name in changes else None
        if projection is None:
            continue
        weight = module.get_parameter(projection)
        joint = weight.shape[0] != weight.shape[1]
        prefix = f"{name}." if name else ""
        queries = named[prefix + projection].shape[0] // (3 if joint else 1)
        for local in (projection, _bias_of(projection)):
            if prefix + local in named:
                others = named[prefix + local].shape[0] - queries
                found[prefix + local] = (1.0 / changes[name],) * queries + (1.0,) * others
    return found


def _bias_of(weight: str) -> str:
    return "in_proj_bias" if weight == "q_proj_weight" else weight.removesuffix("weight") + "bias"


def are_undone(model: nn.Module, plan: Plan, keep: np.ndarray, changes: Mapping[str, float]) -> bool:
    """Whether the small network, with those factors, computes what the masked one does.

    Args:
        model: the dense network; left as it was.
        plan: its plan.
        keep: bool per unit id.
        changes: as in `factors`.
    """
    modules = dict(walk(model))
    if all(attention.known(modules[name]) for name in changes):
        return True
    small, _ = cut(model, plan, keep, kept_indices(plan, keep))
    rescale(small, factors(model, small, changes))
    try:
        worst = reference.gap(
            reference.forward(model, plan, keep, plan.example), reference.outputs(small, plan.example)
        )
    except (SurgeryError, RuntimeError, IndexError, TypeError, ValueError):
        return False
    return worst <= reference.TOLERANCE
