"""Widths that live in Python: module attributes (`in_channels`, `normalized_shape`, `num_heads`) that must follow.

Known layers take theirs from their new weights. Of other modules an integer changes only where the labelled run read it: it
gets the new number of what an operator counted with it; one that sizes of channels were reckoned from gets the new size
that its module's tensors (else those inside it, else the heads that its views cut) have in place of the old one. What only
looks like a width, because it was read for something else or not at all, stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prune_cli.structure.attention import HEAD_COUNTS
from prune_cli.structure.labels import varied
from prune_cli.structure.modules import LAYERS, lendable, names_in_forward, walk
from prune_cli.structure.prunable import Target
from prune_cli.structure.reads import Origin
from prune_cli.structure.trace import Trace

Edits = dict[str, dict[str, Any]]
INNER = re.compile(r"attn_dim|dim_attn|attention_dim|inner|all_head|value_dim|key_dim|qk_dim|d_attn|proj_dim|dim_out_v")


def edits(
    dense: nn.Module,
    small: nn.Module,
    traces: tuple[Trace, ...],
    units: np.ndarray,
    keep: np.ndarray,
    compared: Set[tuple[str, str]],
) -> Edits:
    """New values of attributes.

    Args:
        dense: the dense network.
        small: the same network with the new parameters and the old attributes.
        traces: executions of the dense network.
        units: unit id per variable.
        keep: bool per unit id.
        compared: (module, attribute) that are widths too, as earlier checks have taught.

    Returns:
        Module name -> attribute -> new value; ints and lists of ints.
    """
    found: Edits = {}
    modules, twins = walk(dense), dict(walk(small))
    sizes = {name: _sizes(module, twins[name]) for name, module in modules}
    for name, pairs in _splits(traces, units, keep):
        sizes[name].extend([*pairs, (sum(old for old, _ in pairs), sum(new for _, new in pairs))])
    inside = Inside(sizes)
    cuts = _cut_sizes(traces, units, keep)
    shapes = _norm_shapes(traces, units, keep)
    counted = _counted(traces, units, keep)
    flows = {place for trace in traces for place in trace.flows} | compared
    for name, module in modules:
        changes = _layer(module, twins[name])
        if name in shapes and hasattr(module, "normalized_shape"):
            changes["normalized_shape"] = shapes[name]
        keys = [
            key for key in lendable(module) if (name, key) in flows or any(o.key == key for o in counted.get(name, ()))
        ]
        if keys:
            numbers = {key: module.__dict__[key] for key in keys if (name, key) in flows}
            others = _others(numbers, name, inside, cuts.get(name, ())) if numbers else {}
            others |= _as_counted(module, keys, others, counted.get(name, {}))
            changes |= {key: value for key, value in others.items() if key not in changes}
        changes = {
            key: value
            for key, value in changes.items()
            if hasattr(module, key) and _plain(getattr(module, key)) != value
        }
        if changes:
            found[name] = changes
    return found


def _counted(
    traces: tuple[Trace, ...], units: np.ndarray, keep: np.ndarray
) -> dict[str, dict[Origin, set[int | None]]]:
    """By module: attribute -> what operators that took it as a size need it to be; None where it must stay."""
    found: dict[str, dict[Origin, set[int | None]]] = {}
    for trace in traces:
        for origin, label, axis in trace.uses:
            new: int | None = None
            if label is not None:
                axes = varied(label)
                kept = _keep(_dense(label, axes), units, keep)
                new = (
                    int(kept.any(axis=tuple(i for i, a in enumerate(axes) if a != axis)).sum())
                    if axis in axes
                    else None
                )
            found.setdefault(origin.module, {}).setdefault(origin, set()).add(new)
    return found


def _as_counted(
    module: nn.Module, keys: Sequence[str], guessed: Mapping[str, Any], counted: Mapping[Origin, set[int | None]]
) -> dict[str, Any]:
    """Attributes with what operators count; where those do not agree, the old value: the check will say which failed."""
    changes: dict[str, Any] = {}
    for key in keys:
        old = module.__dict__[key]
        items = [old] if isinstance(old, int) else list(old)
        new = items.copy() if key not in guessed else [guessed[key]] if isinstance(old, int) else list(guessed[key])
        for origin, wanted in counted.items():
            if origin.key == key:
                place = origin.place or 0
                numbers = {items[place] if one is None else one for one in wanted}
                new[place] = numbers.pop() if len(numbers) == 1 else items[place]
        changes[key] = new[0] if isinstance(old, int) else new
    return changes


def unread(dense: nn.Module, traces: tuple[Trace, ...], found: Edits, sizes: Set[int]) -> list[str]:
    """Attributes that equal a width that changed, stay as they are, and may be read by code that did not run.

    Args:
        dense: the dense network.
        traces: its executions.
        found: the attributes that change.
        sizes: the old widths.

    Returns:
        `module.attribute`, sorted.
    """
    read = {
        (o.module, o.key) for trace in traces for o in (*(u.origin for u in trace.uses), *(t[2] for t in trace.touched))
    }
    read |= {place for trace in traces for place in trace.flows}
    left = []
    for name, module in walk(dense):
        kind: type = type(module)
        names = names_in_forward(kind)
        for key in lendable(module) if names else ():
            value = module.__dict__[key]
            items = {value} if isinstance(value, int) else set(value)
            if key in names and (name, key) not in read and key not in found.get(name, {}) and items & sizes:
                left.append(f"{name}.{key}" if name else key)
    return sorted(left)


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
    if isinstance(dense, nn.MultiheadAttention):
        return _attention(dense, small)
    if isinstance(dense, nn.RNNBase):
        return _recurrent(dense, small) if "weight_ih_l0" in dense._parameters else {}
    if isinstance(dense, nn.RNNCellBase):
        rows, columns = small.get_parameter("weight_ih"), small.get_parameter("weight_hh")
        return {"input_size": rows.shape[1], "hidden_size": columns.shape[1]}
    if not isinstance(dense, LAYERS) and not hasattr(dense, "normalized_shape"):
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


def _attention(dense: nn.MultiheadAttention, small: nn.Module) -> dict[str, Any]:
    """The number of heads stays: equal positions go from every head."""
    width = Target("out_proj", small.get_submodule("out_proj")).weight.shape[0]
    changes = {"embed_dim": width, "head_dim": width // dense.num_heads, "kdim": width, "vdim": width}
    if "q_proj_weight" in small._parameters and small._parameters["q_proj_weight"] is not None:
        changes |= {f"{one}dim": small.get_parameter(f"{one}_proj_weight").shape[1] for one in "kv"}
    return changes


def _recurrent(dense: nn.RNNBase, small: nn.Module) -> dict[str, Any]:
    gates = dense.get_parameter("weight_ih_l0").shape[0] // dense.hidden_size
    inputs, states = small.get_parameter("weight_ih_l0"), small.get_parameter("weight_hh_l0")
    sizes = {"input_size": inputs.shape[1], "hidden_size": inputs.shape[0] // gates}
    return sizes | ({"proj_size": states.shape[1]} if dense.proj_size else {})


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


def _others(numbers: Mapping[str, Any], name: str, inside: Inside, cuts: Any) -> dict[str, Any]:
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
            near = _table(iter(inside.sizes[name]))
        items = [value] if isinstance(value, int) else list(value)
        if not wide and any(item not in near for item in items):
            wide = _table(inside.below(name, numbers.values()))
        items = [near.get(item, wide.get(item, item)) for item in items]
        changes[key] = items[0] if isinstance(value, int) else items
    return changes


def _head(key: str, value: Any, cuts: dict[tuple[str, int], int]) -> dict[str, Any]:
    if INNER.search(key) and ("inner", value) in cuts:
        return {key: cuts["inner", value]}
    role = "heads" if key in HEAD_COUNTS or "num" in key else "dims"
    return {key: cuts[role, value]} if isinstance(value, int) and (role, value) in cuts else {}


def _table(sizes: Iterator[tuple[int, int]]) -> dict[int, int]:
    """Old size -> new size; where old sizes went different ways the most frequent."""
    votes: dict[int, dict[int, int]] = {}
    for old, new in sizes:
        tally = votes.setdefault(old, {})
        tally[new] = tally.get(new, 0) + 1
    return {old: min(tally, key=lambda new: (-tally[new], new)) for old, tally in votes.items()}


def _cut_sizes(
    traces: tuple[Trace, ...], units: np.ndarray, keep: np.ndarray
) -> dict[str, tuple[tuple[tuple[str, int], int], ...]]:
    """Per attention module: (role, old size) -> new size of the head axes that its views cut."""
    found: dict[str, dict[tuple[str, int], int]] = {}
    for trace in traces:
        for cut in trace.cuts:
            axes = varied(cut.label)
            kept = _keep(_dense(cut.label, axes), units, keep)
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


def _norm_shapes(traces: tuple[Trace, ...], units: np.ndarray, keep: np.ndarray) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for trace in traces:
        for layer, shape, label in trace.widths:
            if len(shape) == 1:
                shapes[layer] = [int(_keep(label, units, keep).sum())]
    return shapes


def _dense(label: Tensor, axes: Sequence[int]) -> Tensor:
    return label.as_strided([label.shape[a] for a in axes], [label.stride(a) for a in axes], label.storage_offset())


def _keep(label: Tensor, units: np.ndarray, keep: np.ndarray) -> np.ndarray:
    ids = units[np.maximum(label.numpy(), 0)]
    return keep[ids] | (ids == 0)
