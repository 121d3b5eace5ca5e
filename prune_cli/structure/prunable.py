"""Layers whose weights can be pruned, and what is known of one such weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

PRUNABLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The weight of one layer.

    Attributes:
        layer: dotted name of the module; empty for a network that is itself a layer.
        module: the layer.
    """

    layer: str
    module: nn.Module

    @property
    def name(self) -> str:
        """The weight's name among the network's parameters."""
        return f"{self.layer}.weight" if self.layer else "weight"

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies with: a parameter, or computed where it is parametrised."""
        weight: Tensor = getattr(self.module, "weight")  # noqa: B009 - Module's is too wide
        return weight

    @property
    def is_parameter(self) -> bool:
        """Whether single weights can be masked; not where the weight is computed from other parameters."""
        return isinstance(self.weight, nn.Parameter)

    @property
    def bias(self) -> Tensor | None:
        """(out_channels,), None without one."""
        bias: Tensor | None = getattr(self.module, "bias", None)
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
    return Target(owner(name), model.get_submodule(owner(name)))


def owner(name: str) -> str:
    """Dotted name of the module that a parameter belongs to; empty for the network itself."""
    return name.rpartition(".")[0]
