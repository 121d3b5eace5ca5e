"""Which layers granularities inside a kernel apply to: those whose kernels have the positions they need."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from torch import nn

from prune_cli.errors import ConfigError
from prune_cli.structure import prunable

log = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def many_positions(module: nn.Module) -> bool:
    """Whether a layer is a convolution (not transposed) whose kernels have more than one position."""
    return isinstance(module, CONVOLUTIONS) and math.prod(module.kernel_size) > 1


def with_such_units(
    model: nn.Module, ratios: Mapping[str, float | str], fits: Callable[[nn.Module], bool], unit: str, needs: str
) -> dict[str, float]:
    """The ratios of the layers that have such units.

    Where every layer of the network was asked for the same, the others stay dense. Where layers were chosen, by rules
    or a file, a chosen layer without such units is an error.

    Args:
        fits: whether a layer has such units.
        unit: name of the granularity, for messages.
        needs: what the layer would have to be, for messages.

    Raises:
        ConfigError: a chosen layer does not fit, or none does.
    """
    asked = {name: float(ratio) for name, ratio in ratios.items() if not isinstance(ratio, str)}
    targets = prunable.targets(model)
    everything = set(asked) == set(targets) and len(set(asked.values())) == 1
    found, others = {}, []
    for name, ratio in asked.items():
        if fits(targets[name].module):
            found[name] = ratio
        elif ratio > 0:
            others.append(name)
    if others and not everything:
        shape = "x".join(map(str, targets[others[0]].weight.shape))
        raise ConfigError(
            f"{others[0]} ({shape}): granularity={unit} needs {needs}; exclude this layer, or choose granularity=filter"
        )
    if not found and asked:
        raise ConfigError(f"granularity={unit} needs {needs}, and the network has none; choose granularity=element")
    if others:
        log.debug("granularity=%s leaves dense what is not %s: %s", unit, needs, ", ".join(others))
    return found
