"""Taking units out of a network: a new, smaller module that computes what the masked one does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.structure import follow
from prune_cli.structure.attributes import Edits, unread
from prune_cli.structure.checker import examine
from prune_cli.structure.lineage import Lineage, Shrunk
from prune_cli.structure.modules import named_tensors
from prune_cli.structure.plan import Plan
from prune_cli.structure.rebuild import rescale
from prune_cli.structure.scales import factors
from prune_cli.structure.slicing import as_tuples, cut, kept_indices, sliced

log = logging.getLogger(__name__)


def remove_units(
    model: nn.Module, plan: Plan, keep: np.ndarray, optimizer: torch.optim.Optimizer | None = None
) -> Shrunk:
    """Removes units and returns a new, smaller module.

    Parameter names, ties, hooks, `requires_grad`, gradients and the modes survive. The dense model stays as it was.
    Where an operator can't follow, the channels that touch it are kept, and `Shrunk.plan` says so in a warning.

    Args:
        model: the network that the plan was made for.
        plan: from `channels.analyse`.
        keep: bool per unit id.
        optimizer: re-pointed in place to the new parameters; momentum and moments are sliced along.

    Raises:
        SurgeryError: `keep` would empty an axis, or the model can't be copied.
    """
    if keep.shape != (plan.size,) or keep.dtype != np.bool_:
        raise SurgeryError(f"keep has shape {keep.shape} and type {keep.dtype}; give {plan.size} bools")
    kept = kept_indices(plan, keep)
    for name, axes in kept.items():
        for axis, indices in axes.items():
            if not len(indices):
                raise SurgeryError(f"nothing would be left of axis {axis} of {name!r}; keep at least one unit there")
    small, found = cut(model, plan, keep, kept)
    refusals, changes = examine(small, plan, keep)
    if refusals:
        asked, choice = plan, keep
        plan, keep, changes = follow.follow(model, plan, lambda p: translate(asked, choice, p))
        kept = kept_indices(plan, keep)
        small, found = cut(model, plan, keep, kept)
        for warning in plan.warnings[len(asked.warnings) :]:
            log.warning("%s", warning)
    _warn_of_unread(model, plan, found, kept)
    scales = factors(model, small, changes)
    rescale(small, scales)
    for name, parameter in named_tensors(model, again=False).items():
        if parameter.is_leaf and parameter.grad is not None and isinstance(parameter, nn.Parameter):
            small.get_parameter(name).grad = sliced(parameter.grad, kept.get(name, {}))
    if optimizer is not None:
        repoint(optimizer, model, small, kept)
    plain = as_tuples(kept)
    return Shrunk(small, Lineage(plain, found, scales), plan, keep)


def _warn_of_unread(model: nn.Module, plan: Plan, found: Edits, kept: Mapping[str, Mapping[int, np.ndarray]]) -> None:
    named = named_tensors(model)
    sizes = {named[name].shape[axis] for name, axes in kept.items() for axis in axes}
    if left := unread(model, plan.traces, found, sizes):
        log.warning(
            "%s stay%s: equal to a width that changed, but no code that ran on the example read %s as one",
            ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else ""),
            "s" if len(left) == 1 else "",
            "it" if len(left) == 1 else "them",
        )


def translate(plan: Plan, keep: np.ndarray, other: Plan) -> np.ndarray:
    """The choice in the units of another plan of the same network: a unit stays if any of its positions stayed."""
    present = keep.copy()
    present[0] = True
    result = np.zeros(other.size, dtype=bool)
    for name, axes in other.axes.items():
        for axis, ids in axes.items():
            old = plan.axes.get(name, {}).get(axis)
            stays = np.ones(len(ids), dtype=bool) if old is None else present[old]
            result[ids[stays]] = True
    result[0] = True
    return result


def repoint(
    optimizer: torch.optim.Optimizer,
    dense: nn.Module,
    small: nn.Module,
    kept: Mapping[str, Mapping[int, Any]],
) -> None:
    """Gives an optimizer of a network the parameters of a smaller one, in place; its moments are sliced along.

    Moments are shaped like their parameter, or have length 1 along some axes (Adafactor's rows and columns). What an
    optimizer keeps in other shapes cannot be sliced: where a parameter changed it starts anew.

    Args:
        optimizer: of the parameters of `dense`.
        dense: the network before.
        small: the network after, with the same names.
        kept: parameter name -> axis -> kept indices, as in a `Lineage`.
    """
    twins = {id(p): (name, small.get_parameter(name)) for name, p in dense.named_parameters()}
    for group in optimizer.param_groups:
        group["params"][:] = [twins[id(p)][1] if id(p) in twins else p for p in group["params"]]
    if getattr(optimizer, "_numel_cache", None) is not None:  # of LBFGS
        optimizer._numel_cache = None  # type: ignore[attr-defined]
    for old in list(optimizer.state):
        if not isinstance(old, Tensor) or id(old) not in twins:
            continue
        name, new = twins[id(old)]
        state = optimizer.state.pop(old)
        axes = kept.get(name, {})
        if all(_follows(value, old) for value in state.values()):
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() == old.dim():
                    state[key] = sliced(value, {a: kept_ for a, kept_ in axes.items() if value.shape[a] > 1})
            optimizer.state[new] = state
        elif not axes:
            optimizer.state[new] = state


def _follows(value: Any, parameter: Tensor) -> bool:
    """Whether a part of an optimizer's state can be sliced with its parameter, or says nothing about single weights."""
    if isinstance(value, Tensor) and value.numel() > 1:
        return value.dim() == parameter.dim() and all(
            a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True)
        )
    return not isinstance(value, (list, tuple, dict))
