"""Layers whose weights can be pruned, and which axis of theirs holds outputs."""

from __future__ import annotations

from torch import Tensor, nn


def output_axis(model: nn.Module, name: str) -> int:
    """Axis of a weight along which the layer's output channels lie: 1 for transposed convolutions, else 0."""
    return int(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.conv._ConvTransposeNd))


PRUNABLE = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be pruned, by dotted module name, in the order of the module tree.

    A weight that several layers share is there once, with the first of them.
    """
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    again -= {name for name, _ in model.named_parameters()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PRUNABLE) and f"{name}.weight" not in again
    }


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight that a layer multiplies with, by its name: a parameter, or computed where it is parametrised."""
    weight: Tensor = getattr(model.get_submodule(name.rpartition(".")[0]), "weight")  # noqa: B009 - Module's is too wide
    return weight
