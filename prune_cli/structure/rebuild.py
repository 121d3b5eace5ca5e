"""A small network from the dense one and its lineage, without example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError, nearest
from prune_cli.layers import replacing
from prune_cli.structure import attributes as widths
from prune_cli.structure.lineage import Lineage
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


def rebuild(dense: nn.Module, lineage: Lineage) -> nn.Module:
    """The small network from the dense one, without example inputs; weights are sliced along.

    Args:
        dense: the network that the lineage starts from (its weights matter only if none are loaded afterwards).
        lineage: from `shrink`, composed over rounds.

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
            if not (axis < len(shape) and indices and ordered and indices[0] >= 0 and indices[-1] < shape[axis]):
                raise SurgeryError(
                    f"kept indices of axis {axis} of {name!r} do not fit its shape {tuple(shape)}; "
                    "give increasing indices inside it"
                )
    modules = dict(dense.named_modules())
    for name, values in lineage.attributes.items():
        if name not in modules:
            raise SurgeryError(f"the network has no module {name!r}{nearest(name, modules)}")
        for key in values:
            if not hasattr(modules[name], key):
                raise SurgeryError(f"module {name!r} has no attribute {key!r}{nearest(key, vars(modules[name]))}")
    with torch.no_grad():
        small = copy_with(dense, sliced, lineage.kept)
    widths.apply(small, {n: dict(values) for n, values in lineage.attributes.items()})
    for name, factors in lineage.scales.items():
        if name not in named or len(factors) != named_tensors(small)[name].shape[0]:
            raise SurgeryError(f"scales of {name!r} do not fit the network")
    rescale(small, lineage.scales)
    replacing.place(small, lineage.stripes)
    return small
