"""A small network from the dense one and its lineage, without example inputs, and plain layers from replaced ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError, nearest
from prune_cli.layers import replacing
from prune_cli.layers.kind import Expanded
from prune_cli.masks import Masks
from prune_cli.structure import attributes as widths
from prune_cli.structure.lineage import Lineage, Replacement
from prune_cli.structure.modules import named_tensors
from prune_cli.structure.slicing import NO_AXES, channels_view, copy_with, sliced


def rescale(model: nn.Module, scales: Mapping[str, tuple[float, ...]]) -> None:
    if not scales:
        return
    named = named_tensors(model)
    with torch.no_grad():
        for name, factors in scales.items():
            parameter = named[name]
            line = torch.tensor(factors, dtype=parameter.dtype, device=parameter.device)
            parameter.mul_(channels_view(line, 0, parameter.dim()))


@torch.no_grad()
def carried(tensors: Mapping[str, Tensor], lineage: Lineage) -> dict[str, Tensor]:
    """Other values of the dense network's parameters and buffers as the small one has them: sliced and rescaled.

    Args:
        tensors: by parameter or buffer name, shaped like them.
        lineage: how the small network descends from the one that the tensors belong to.
    """
    found = {name: sliced(tensor, lineage.kept.get(name, NO_AXES)) for name, tensor in tensors.items()}
    for name, factors in lineage.scales.items():
        if name in found:
            value = found[name]
            line = torch.tensor(factors, dtype=value.dtype, device=value.device)
            value.mul_(channels_view(line, 0, value.dim()))
    return found


# ---------------------------------------------------------------------------------------------- the way back

SET = (bool, int, float)
"""Values of attributes that are set: in sequences too."""


def rebuild(dense: nn.Module, lineage: Lineage) -> nn.Module:
    """The small network from the dense one, without example inputs; weights are sliced along.

    Args:
        dense: the network that the lineage starts from (its weights matter only if none are loaded afterwards).
        lineage: from `remove_units`, composed over rounds; it may come from a file.

    Raises:
        SurgeryError: the lineage does not fit the network.
    """
    named = named_tensors(dense)
    for name, axes in lineage.kept.items():
        if name not in named:
            raise SurgeryError(f"the network has no tensor {name!r}{nearest(name, named)}")
        for axis, indices in axes.items():
            shape = named[name].shape
            ordered = all(a < b for a, b in pairwise(indices))
            if not (0 <= axis < len(shape) and indices and ordered and indices[0] >= 0 and indices[-1] < shape[axis]):
                raise SurgeryError(
                    f"kept indices of axis {axis} of {name!r} do not fit its shape {tuple(shape)}; "
                    "give increasing indices inside it"
                )
    _check_attributes(dense, lineage)
    with torch.no_grad():
        small = copy_with(dense, sliced, lineage.kept)
    widths.apply(small, {n: dict(values) for n, values in lineage.attributes.items()})
    for name, factors in lineage.scales.items():
        if name not in named or len(factors) != named_tensors(small)[name].shape[0]:
            raise SurgeryError(f"scales of {name!r} do not fit the network")
    rescale(small, lineage.scales)
    place(small, lineage.replaced)
    return small


def _check_attributes(model: nn.Module, lineage: Lineage) -> None:
    """Refuses edits of anything but public numbers that the network's modules have already."""
    modules = dict(model.named_modules())
    for name, values in lineage.attributes.items():
        if name not in modules:
            raise SurgeryError(f"the network has no module {name!r}{nearest(name, modules)}")
        for key in values:
            if not hasattr(modules[name], key):
                raise SurgeryError(f"module {name!r} has no attribute {key!r}{nearest(key, vars(modules[name]))}")
            old = getattr(modules[name], key)
            if key.startswith("_") or not (old is None or isinstance(old, (*SET, list, tuple))):
                raise SurgeryError(f"attributes.{name}.{key} is no number of this network; it is not set")
            if max(_whole(values[key]), default=0) > max(_whole(old), default=math.inf):
                raise SurgeryError(
                    f"attributes.{name}.{key} is larger than in the dense network; surgery makes it smaller"
                )


def _whole(value: Any) -> list[int]:
    """The sizes of the whole numbers in a value."""
    return [abs(item) for item in (value if isinstance(value, list | tuple) else [value]) if type(item) is int]


def place(model: nn.Module, replaced: Mapping[str, Replacement]) -> None:
    """Replaces modules, in place, those further inside first, and does to each what was done inside it.

    A module that the network holds under several names may be given under each of them, alike.

    Raises:
        SurgeryError: no such module, or a replacement that does not fit it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    done: dict[int, Replacement] = {}
    for name, one in sorted(replaced.items(), key=lambda item: -item[0].count(".")):
        if name in modules and (same := done.get(id(modules[name]))) is not None:
            if same != one:
                raise SurgeryError(f"{name!r} is one module under several names, but replaced in different ways")
            continue
        made = replacing.place(model, name, one.kind, one.data)
        if name in modules:
            done[id(modules[name])] = one
        if one.inside:
            if parts := replacing.kind_named(one.kind).closed:
                raise SurgeryError(f"{name!r} consists of {parts}, inside which nothing is sliced")
            replacing.exchange(model, made, rebuild(made, one.inside))


def expanded(
    model: nn.Module, masks: Masks, lineage: Lineage, *, everything: bool = False
) -> tuple[nn.Module, dict[str, Tensor], Lineage]:
    """The network with plain layers in place of replaced ones, with masks and lineage of the same function.

    Args:
        model: left as it was.
        masks: parameter name -> bool tensor, True = keep, of `model`.
        lineage: how `model` descends from the dense network.
        everything: whether kinds that are pruned inside (a rotation, a gate) are expanded too, not only closed ones.
    """
    if not _opens(lineage, everything):
        return model, dict(masks), lineage
    return _expanded(copy.deepcopy(model), dict(masks), lineage, everything)


def _opens(lineage: Lineage, everything: bool) -> bool:
    return any(
        everything or replacing.kind_named(one.kind).closed or _opens(one.inside, everything)
        for one in lineage.replaced.values()
    )


def _expanded(
    model: nn.Module, masks: dict[str, Tensor], lineage: Lineage, everything: bool
) -> tuple[nn.Module, dict[str, Tensor], Lineage]:
    """`expanded`, in place; the outermost replacements first, as those further inside were placed before them."""
    done: dict[int, Lineage] = {}  # what came out, for modules under several names
    for name in sorted(lineage.replaced, key=lambda name: name.count(".")):
        one, layer = lineage.replaced[name], model.get_submodule(name)
        opens = everything or bool(replacing.kind_named(one.kind).closed)
        if (now := done.get(id(layer))) is not None:
            lineage = _recorded(lineage, name, now, opens)
            continue
        own, masks = _parted(masks, name)
        module, own, inside = _expanded(layer, own, one.inside, everything)
        if opens:
            opened = replacing.kind_named(one.kind).expand(module, own)
            module, own, inside = opened.module, dict(opened.masks), _plainly(opened, inside)
        lineage, done[id(module)] = _recorded(lineage, name, inside, opens), inside
        replacing.exchange(model, layer, module)
        masks |= {f"{name}.{inner}": mask for inner, mask in own.items()}
    return model, masks, lineage


def _plainly(opened: Expanded, inside: Lineage) -> Lineage:
    """What surgery did inside a replaced module, as what it did to the plain one."""
    if opened.inner is not None:
        return inside.within(opened.inner)
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (source, axis), (target, along) in opened.axes.items():
        if (indices := inside.kept.get(source, {}).get(axis)) is not None:
            kept.setdefault(target, {})[along] = indices
    return Lineage(kept, {"": dict(opened.attributes)} if opened.attributes else {})


def _recorded(lineage: Lineage, name: str, now: Lineage, opens: bool) -> Lineage:
    """The lineage with a module opened, or with something opened inside it."""
    if opens:
        return lineage.opened(name, now)
    return replace(lineage, replaced={**lineage.replaced, name: replace(lineage.replaced[name], inside=now)})


def _parted(masks: Masks, module: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks of what is inside a module, by names inside, and the others."""
    before = f"{module}."
    inside = {name[len(before) :]: mask for name, mask in masks.items() if name.startswith(before)}
    return inside, {name: mask for name, mask in masks.items() if not name.startswith(before)}
