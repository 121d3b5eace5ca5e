"""Weights of other shapes and names onto a network: prefixes, ties, counters; what does not fit, in one line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prune_cli.errors import CheckpointError
from prune_cli.tensors import memory_of

log = logging.getLogger(__name__)
# counts the batches of a norm; older checkpoints lack it and inference does not need it
_BATCH_COUNTER = ".num_batches_tracked"
_SHOWN = 4


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads `state` into `model` in place, keeping its device, dtype and memory format.

    Accepted beside an exact match: missing counters of batches, a tied tensor under one of its names only, and one
    module under another name (`fc` for `linear`) if only one renaming fits names and sizes; that is logged.

    Args:
        model: the network.
        state: tensors by name.
        source: where they come from, for the message.

    Raises:
        CheckpointError: one line that lists missing and unexpected names and wrong sizes. The model is
            unchanged.
    """
    own = model.state_dict()
    own = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    given = _with_ties(own, dict(state))
    unexpected = [name for name in given if name not in own]
    if unexpected:
        renamed = _renamed(own, given)
        if renamed is not None:
            old, new, given = renamed
            log.info("weights %s: %s of the file is %s of the network", source, old or "the top", new or "the top")
            given = _with_ties(own, given)
            unexpected = []
    missing = [name for name in own if name not in given and not name.endswith(_BATCH_COUNTER)]
    wrong = [name for name in own if name in given and not _fits(own[name], given[name])]
    problems = []
    if missing:
        problems.append(f"missing {len(missing)}: " + listed([_sized(name, own[name]) for name in missing]))
    if unexpected:
        texts = [_sized(name, given[name]) for name in unexpected]
        problems.append(f"unexpected {len(unexpected)}: " + listed(texts))
    if wrong:
        texts = [f"{_sized(name, given[name])} should be {_described(own[name])}" for name in wrong]
        problems.append(f"wrong size {len(wrong)}: " + listed(texts))
    if problems:
        raise CheckpointError(f"weights {source} do not fit {type(model).__name__}; " + "; ".join(problems))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in given:
                tensor.copy_(given[name])


def _fits(own: Tensor, given: Tensor) -> bool:
    return own.shape == given.shape and own.is_floating_point() == given.is_floating_point()


def _described(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {tensor.dtype}".replace("torch.", "")
    return f"{list(tensor.shape)}{kind}"


def _sized(name: str, tensor: Tensor) -> str:
    return f"{name} {_described(tensor)}"


def listed(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _with_ties(own: Mapping[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the other names of tensors that the network ties and the file holds once."""
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in own.items():
        identity = memory_of(tensor)
        if name in given and identity is not None:
            first.setdefault(identity, name)
    for name, tensor in own.items():
        identity = memory_of(tensor)
        if name not in given and identity in first:
            given[name] = given[first[identity]]
    return given


def _renamed(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[str, str, dict[str, Tensor]] | None:
    """Finds the one renaming of a module prefix in the file that makes names and sizes fit.

    Returns:
        The prefix in the file, the prefix in the network ("" is the top) and the renamed tensors; None if no
        renaming fits, or if two different ones do.
    """
    unexpected = [name for name in given if name not in own]
    missing = [name for name in own if name not in given]
    required = [name for name in missing if not name.endswith(_BATCH_COUNTER)]
    if not required:
        return None
    found: dict[tuple[tuple[str, str], ...], tuple[str, str]] = {}
    for old, new in sorted(_prefix_pairs(required[0], unexpected)):
        if not all(_under(old, name) for name in unexpected):
            continue
        mapping = {name: _moved(name, old, new) for name in unexpected}
        fits = all(to in own and _fits(own[to], given[name]) for name, to in mapping.items())
        if fits and set(required) <= set(mapping.values()) <= set(missing):
            found.setdefault(tuple(sorted(mapping.items())), (old, new))
    if len(found) != 1:
        return None
    mapping_items, (old, new) = next(iter(found.items()))
    moves = dict(mapping_items)
    return old, new, {moves.get(name, name): tensor for name, tensor in given.items()}


def _prefix_pairs(wanted: str, names: list[str]) -> set[tuple[str, str]]:
    """Returns (prefix in the file, prefix in the network) that turn one of `names` into `wanted`."""
    parts = wanted.split(".")
    pairs = set()
    for cut in range(len(parts)):
        suffix = ".".join(parts[cut:])
        for name in names:
            if name == suffix or name.endswith("." + suffix):
                pairs.add((name[: -len(suffix)].rstrip("."), ".".join(parts[:cut])))
    return pairs


def _under(prefix: str, name: str) -> bool:
    return not prefix or name.startswith(prefix + ".")


def _moved(name: str, old: str, new: str) -> str:
    rest = name[len(old) + 1 :] if old else name
    return f"{new}.{rest}" if new else rest
