"""Widths that live in Python: module attributes (`in_channels`, `normalized_shape`, `num_heads`) that must follow.

Known layers take theirs from their new weights. In other modules an integer that equals an old size near by (the
module's own parameters, else those of the layers inside it, else the heads that its views cut) gets the new size. A
wrong guess is harmless: the check forward refuses it and the channels are kept.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prune_cli.structure.attention import HEAD_COUNTS
from prune_cli.structure.interpreter import Trace
from prune_cli.structure.labels import varied
from prune_cli.structure.modules import names_a_width, walk, widths_of

Edits = dict[str, dict[str, Any]]
NO_NUMBERS = frozenset({bool, float, str, type(None), dict, OrderedDict, set})
_LAYERS = (_ConvNd, nn.Linear, nn.Bilinear, _NormBase, nn.GroupNorm, nn.Embedding, nn.PReLU)
PAD = re.compile(r"front|before|first|left|pad")  # an attribute that may say how many channels of zeros come first
INNER = re.compile(r"attn_dim|dim_attn|attention_dim|inner|all_head|value_dim|key_dim|qk_dim|d_attn|proj_dim|dim_out_v")


def edits(
    dense: nn.Module,
    small: nn.Module,
    traces: tuple[Trace, ...],
    units: np.ndarray,
    keep: np.ndarray,
    guesses: Mapping[str, int],
) -> Edits:
    """New values of attributes.

    Args:
        dense: the dense network.
        small: the same network with the new parameters and the old attributes.
        traces: executions of the dense network.
        units: unit id per variable.
        keep: bool per unit id.
        guesses: module name -> how attributes of unknown meaning are set (trace.Fallbacks).

    Returns:
        Module name -> attribute -> new value; ints and lists of ints.
    """
    found: Edits = {}
    modules, twins = walk(dense), dict(walk(small))
    sizes = {name: _sizes(module, twins[name]) for name, module in modules}
    splits = _splits(traces, units, keep)
    for name, pairs in splits:
        sizes[name].extend([*pairs, (sum(old for old, _ in pairs), sum(new for _, new in pairs))])
    inside = Inside(sizes)
    changed = frozenset(old for pairs in sizes.values() for old, new in pairs if old != new)
    cuts = _cut_sizes(traces, units, keep)
    pads, bounds = _pads(traces, units, keep), _bounds(traces, units, keep)
    shapes = _norm_shapes(traces, units, keep)
    for name, module in modules:
        changes = _layer(module, twins[name])
        if name in shapes and hasattr(module, "normalized_shape"):
            changes["normalized_shape"] = shapes[name]
        if not (changes and type(module).__module__.startswith("torch.nn.modules")):
            others = _others(module, name, inside, changed, cuts.get(name, ()), guesses.get(name, 0))
            changes |= {k: v for k, v in others.items() if k not in changes}
        changes |= _part_sizes(module, [pairs for layer, pairs in splits if layer == name])
        for old, new in bounds.get(name, {}).items():
            changes |= dict.fromkeys(widths_of(module, old), new)
        if name in pads:
            old, new = pads[name]
            changes |= {k: new for k, v in vars(module).items() if PAD.search(k) and type(v) is int and v == old}
        changes = {
            key: value
            for key, value in changes.items()
            if hasattr(module, key) and _plain(getattr(module, key)) != value
        }
        if changes:
            found[name] = changes
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def apply(model: nn.Module, found: Edits) -> None:
    """Sets the attributes; sequences keep their type."""
    for name, changes in found.items():
        module = model.get_submodule(name)
        plain = module.__dict__
        for key, value in changes.items():
            old = getattr(module, key)
            value = type(old)(value) if isinstance(old, (tuple, list)) else value
            if key in plain:
                plain[key] = value
            else:  # a property
                setattr(module, key, value)


def _layer(dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    if isinstance(dense, (nn.RNNBase, nn.RNNCellBase)):
        layer = "_l0" if isinstance(dense, nn.RNNBase) else ""
        rows, columns = getattr(small, f"weight_ih{layer}"), getattr(small, f"weight_hh{layer}")
        found = {"input_size": rows.shape[1], "hidden_size": columns.shape[1]}
        if getattr(dense, "proj_size", 0):
            found |= {"proj_size": columns.shape[1], "hidden_size": getattr(small, f"weight_hr{layer}").shape[1]}
        return found
    if not isinstance(dense, _LAYERS) and not hasattr(dense, "normalized_shape"):
        return {}
    weight = getattr(dense, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    new: Tensor = small.weight  # type: ignore[assignment]
    if isinstance(dense, _ConvNd):
        groups = dense.groups
        if isinstance(dense, _ConvTransposeNd):
            if groups == weight.shape[0]:
                groups = new.shape[0]
            return {"in_channels": new.shape[0], "out_channels": new.shape[1] * groups, "groups": groups}
        if groups > 1 and weight.shape[1] == 1:
            groups = groups * new.shape[0] // weight.shape[0]
        return {"in_channels": new.shape[1] * groups, "out_channels": new.shape[0], "groups": groups}
    if isinstance(dense, nn.Bilinear):
        return {"out_features": new.shape[0], "in1_features": new.shape[1], "in2_features": new.shape[2]}
    if isinstance(dense, nn.Linear):
        return {"in_features": new.shape[1], "out_features": new.shape[0]}
    if isinstance(dense, _NormBase):
        return {"num_features": new.shape[0]}
    if isinstance(dense, nn.GroupNorm):
        return {"num_channels": new.shape[0], "num_groups": _groups(dense, new)}
    if isinstance(dense, nn.Embedding):
        return {"embedding_dim": new.shape[1]}
    if isinstance(dense, nn.PReLU):
        return {"num_parameters": new.shape[0]}
    if hasattr(dense, "normalized_shape"):
        return {"normalized_shape": list(new.shape)}
    return {}


def _groups(dense: nn.GroupNorm, new: Tensor) -> int:
    return new.shape[0] if dense.num_groups == dense.num_channels else dense.num_groups


Sizes = dict[str, list[tuple[int, int]]]  # module name -> (old, new) size of its own axes


def _sizes(dense: nn.Module, small: nn.Module) -> list[tuple[int, int]]:
    """(old, new) size of every axis of a module's own parameters and buffers."""
    return [
        pair
        for kind in ("_parameters", "_buffers")
        for key, tensor in dense.__dict__[kind].items()
        if tensor is not None
        for pair in zip(tensor.shape, small.__dict__[kind][key].shape, strict=True)
    ]


class Inside:
    """Sizes by module in the order of `walk`: what is inside a module follows it."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.names = sizes, list(sizes)
        self.place = {name: index for index, name in enumerate(self.names)}

    def below(self, name: str, values: Iterable[Any]) -> Iterator[tuple[int, int]]:
        """Sizes in a module and those inside it, of the values that are asked for."""
        wanted = {item for value in values for item in ((value,) if isinstance(value, int) else value)}
        prefix = f"{name}." if name else ""
        for index in range(self.place[name], len(self.names)):
            other = self.names[index]
            if other != name and not other.startswith(prefix):
                return
            for pair in self.sizes[other]:
                if pair[0] in wanted:
                    yield pair


def _others(
    dense: nn.Module, name: str, inside: Inside, changed: frozenset[int], cuts: Any, guess: int
) -> dict[str, Any]:
    if guess > 1:
        return {}
    numbers = {
        key: value
        for key, value in dense.__dict__.items()
        if type(value) not in NO_NUMBERS and _is_width(value) and names_a_width(key)
    }
    if not cuts and numbers:  # only what changed somewhere can change here
        numbers = {
            key: value
            for key, value in numbers.items()
            if not changed.isdisjoint((value,) if isinstance(value, int) else value)
        }
    if not numbers:
        return {}
    near: dict[int, int] | None = None
    wide: dict[int, int] = {}
    changes: dict[str, Any] = {}
    for key, value in numbers.items():
        if "head" in key or (INNER.search(key) and isinstance(value, int)):
            found = _head(key, value, dict(cuts))
            changes |= found
            if found or "head" in key:
                continue
        if near is None:
            near = _table(iter(inside.sizes[name]), guess)
        items = [value] if isinstance(value, int) else list(value)
        if not wide and any(item not in near for item in items):
            wide = _table(inside.below(name, numbers.values()), guess)
        items = [near.get(item, wide.get(item, item)) for item in items]
        changes[key] = items[0] if isinstance(value, int) else items
    return changes


def _head(key: str, value: Any, cuts: dict[tuple[str, int], int]) -> dict[str, Any]:
    if INNER.search(key) and ("inner", value) in cuts:
        return {key: cuts["inner", value]}
    role = "heads" if key in HEAD_COUNTS or "num" in key else "dims"
    return {key: cuts[role, value]} if isinstance(value, int) and (role, value) in cuts else {}


def _is_width(value: Any) -> bool:
    sort = type(value)
    if sort is int:
        return bool(value > 1)
    if sort is bool or not isinstance(value, (int, list, tuple)):
        return False
    if isinstance(value, int):
        return value > 1
    return bool(value) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _table(sizes: Iterator[tuple[int, int]], guess: int) -> dict[int, int]:
    """Old size -> new size; where old sizes went different ways the most frequent, or the next one."""
    votes: dict[int, dict[int, int]] = {}
    for old, new in sizes:
        tally = votes.setdefault(old, {})
        tally[new] = tally.get(new, 0) + 1
    ranked = {old: sorted(tally, key=lambda new: (-tally[new], new)) for old, tally in votes.items()}
    return {old: news[min(guess, len(news) - 1)] for old, news in ranked.items()}


def _pads(traces: tuple[Trace, ...], units: np.ndarray, keep: np.ndarray) -> dict[str, tuple[int, int]]:
    """Per module that pads channels: how many zeros it puts first, and how many of them stay."""
    return {layer: (len(line), int(_keep(line, units, keep).sum())) for trace in traces for layer, line in trace.pads}


def _bounds(traces: tuple[Trace, ...], units: np.ndarray, keep: np.ndarray) -> dict[str, dict[int, int]]:
    """Per module that slices channels: bound -> how many of the positions before it stay."""
    found: dict[str, dict[int, int]] = {}
    for trace in traces:
        for layer, line in trace.bounds:
            found.setdefault(layer, {})[len(line)] = int(_keep(line, units, keep).sum())
    return found


def _cut_sizes(
    traces: tuple[Trace, ...], units: np.ndarray, keep: np.ndarray
) -> dict[str, tuple[tuple[tuple[str, int], int], ...]]:
    """Per attention module: (role, old size) -> new size of the head axes that its views cut."""
    found: dict[str, dict[tuple[str, int], int]] = {}
    for trace in traces:
        for cut in trace.cuts:
            axes = varied(cut.label)
            kept = _keep(
                cut.label.as_strided(
                    [cut.label.shape[a] for a in axes],
                    [cut.label.stride(a) for a in axes],
                    cut.label.storage_offset(),
                ),
                units,
                keep,
            )
            for i, axis in enumerate(axes):
                new = int(kept.any(axis=tuple(j for j in range(len(axes)) if j != i)).sum())
                role = "dims" if axis == len(cut.sizes) - 1 else "heads"
                total = cut.sizes[-1] * cut.sizes[axis]
                if role == "heads" and new != cut.sizes[axis] and len(axes) <= 2:
                    found.setdefault(cut.layer, {})["inner", total] = new * cut.sizes[-1]
                if new != cut.sizes[axis] or (role, cut.sizes[axis]) not in found.get(cut.layer, {}):
                    found.setdefault(cut.layer, {})[role, cut.sizes[axis]] = new
    return {layer: tuple(sizes.items()) for layer, sizes in found.items()}


def _splits(
    traces: tuple[Trace, ...], units: np.ndarray, keep: np.ndarray
) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    """Modules that split an axis of channels, with the (old, new) size of every part."""
    return [
        (layer, tuple((len(part), int(_keep(part, units, keep).sum())) for part in parts))
        for trace in traces
        for layer, parts in trace.splits
    ]


def _part_sizes(module: nn.Module, splits: list[tuple[tuple[int, int], ...]]) -> dict[str, list[int]]:
    """Attributes that list the sizes of the parts of a split."""
    return {
        key: [new for _, new in pairs]
        for pairs in splits
        for key, value in vars(module).items()
        if isinstance(value, (list, tuple))
        and all(type(item) is int for item in value)
        and list(value) == [old for old, _ in pairs]
    }


def _norm_shapes(traces: tuple[Trace, ...], units: np.ndarray, keep: np.ndarray) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for trace in traces:
        for layer, shape, label in trace.widths:
            if len(shape) == 1:
                shapes[layer] = [int(_keep(label, units, keep).sum())]
    return shapes


def _keep(label: Tensor, units: np.ndarray, keep: np.ndarray) -> np.ndarray:
    ids = units[np.maximum(label.numpy(), 0)]
    return keep[ids] | (ids == 0)
