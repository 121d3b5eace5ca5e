"""Layers whose weights can be pruned, and what is known of one such weight."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from prune_cli.structure.plan import Plan

PRUNABLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The weight of one layer, or a parameter that multiplies without being a layer's weight.

    Attributes:
        layer: dotted name of the module; empty for a network that is itself a layer.
        module: the layer.
        key: name of the weight inside it.
    """

    layer: str
    module: nn.Module
    key: str = "weight"

    @property
    def name(self) -> str:
        """The weight's name among the network's parameters."""
        return f"{self.layer}.{self.key}" if self.layer else self.key

    @property
    def asked_as(self) -> str:
        """What rules call it: the module, or the parameter where that is no `weight`."""
        return self.layer if self.key == "weight" else self.name

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with: a parameter, or computed where it is parametrised."""
        weight: Tensor = getattr(self.module, self.key)
        return weight

    @property
    def is_parameter(self) -> bool:
        """Whether single weights can be masked; not where the weight is computed from other parameters."""
        return isinstance(self.weight, nn.Parameter)

    @property
    def bias(self) -> Tensor | None:
        """(out_channels,), None without one."""
        bias: Tensor | None = getattr(self.module, "bias", None) if self.key == "weight" else None
        return bias

    @property
    def axis(self) -> int:
        """Axis of the weight along which the layer's output channels lie: 1 for transposed convolutions, else 0."""
        return int(isinstance(self.module, nn.modules.conv._ConvTransposeNd))

    @property
    def channels(self) -> int:
        """How many output channels the layer has."""
        return self.weight.shape[self.axis]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be pruned, by dotted module name, in the order of the module tree.

    A weight that several layers share is there once, with the first of them.
    """
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    again -= {name for name, _ in model.named_parameters()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PRUNABLE) and Target(name, module).name not in again
    }


def targets(model: nn.Module) -> dict[str, Target]:
    """The weights that can be pruned, by parameter name, in the order of `layers`."""
    found = (Target(name, module) for name, module in layers(model).items())
    return {target.name: target for target in found}


def target(model: nn.Module, name: str) -> Target:
    """One weight by its parameter name.

    Raises:
        AttributeError: the network has no such module.
    """
    return Target(owner(name), model.get_submodule(owner(name)), name.rpartition(".")[2])


def computed_weight(name: str) -> str:
    """The weight that is computed from a parameter, by the names that torch gives them; empty for other parameters."""
    layer, new, _ = name.partition(".parametrizations.weight.")
    old = re.fullmatch(r"(.*\.)?weight_(g|v|orig)", name)
    return f"{layer}.weight" if new else f"{old[1] or ''}weight" if old else ""


def is_table(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a table of embeddings, whose features go along with what reads them."""
    return isinstance(model.get_submodule(owner(name)), nn.Embedding | nn.EmbeddingBag)


def bare(model: nn.Module, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Parameters that make channels where no layer of `layers` does: bare ones, and those of classes unknown to torch.

    A channel that any convolution or linear layer makes is asked for by that layer, and bare parameters follow it.
    Tables of embeddings are never asked for.

    Returns:
        Parameter name -> the axes along which its channels lie, the first one first.
    """
    known = frozenset(targets(model))
    parameters = dict(model.named_parameters())
    found: dict[str, tuple[int, ...]] = {}
    for family in plan.families:
        if any(name in known or computed_weight(name) in known for name, _ in family.producers):
            continue
        for name, axis in family.producers:
            if name in parameters and not is_table(model, name) and axis not in found.get(name, ()):
                found[name] = (*found.get(name, ()), axis)
    return found


def owner(name: str) -> str:
    """Dotted name of the module that a parameter belongs to; empty for the network itself."""
    return name.rpartition(".")[0]
