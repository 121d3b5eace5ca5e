"""The learned filter skeleton: which stripes of a filter are needed, found in training (arXiv:2009.14410, section 3.2).

Every convolution's weight is W * I with one number I per stripe, trained together under alpha * sum |I|. A stripe whose
|I| falls to the threshold dies for good. Training already ran with the final mask, so nothing has to be fine-tuned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune_cli.structure.prunable import target

Constants = Mapping[str, Sequence[str]]
"""Weight -> names of the parameters per filter that make a constant of a filter without stripes: the layer's bias, and
scale and shift of the norm behind it."""


class Skeleton(nn.Module):
    """A parametrisation: W -> W * I, with I zero where a stripe is dead.

    Args:
        weight: (out_channels, in_channels, ...) of the layer; I has its shape with one input channel, and begins at 1.
    """

    alive: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.ones_like(weight[:, :1].detach()))
        self.register_buffer("alive", torch.ones_like(self.strength, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.strength * self.alive)

    @torch.no_grad()
    def kill_weak(self, threshold: float, least: int) -> None:
        """Stripes whose |I| is not above the threshold die, but for the `least` strongest of the layer."""
        strength = self.strength.abs().masked_fill(~self.alive, -1.0).flatten()
        strongest = torch.sort(strength, descending=True, stable=True).indices[:least]
        stays = (strength > threshold).index_fill(0, strongest, True)
        self.alive &= stays.view_as(self.alive)


def _skeletons(model: nn.Module, names: Iterable[str]) -> list[tuple[str, Skeleton]]:
    found = []
    for name in names:
        module: Any = target(model, name).module
        found.append((name, module.parametrizations.weight[0]))
    return found


def attach(model: nn.Module, names: Iterable[str]) -> None:
    """Gives the convolutions of these weights a skeleton, in place; `detach` ends it."""
    for name in names:
        module = target(model, name).module
        skeleton = Skeleton(module.get_parameter("weight"))
        parametrize.register_parametrization(module, "weight", skeleton, unsafe=True)


class Shrinkage:
    """What happens between backward and step: the penalty's subgradient, and death. For `fit(regularise=...)`.

    Args:
        model: with skeletons.
        names: their weights.
        alpha: weight of the penalty, 1e-5 on CIFAR.
        threshold: |I| at which a stripe dies, 0.01 in the released commands; 0 lets none die but exact zeros.
        constants: see `Constants`; a filter without living stripes takes its entries to zero.
        least: weight -> stripes that stay however weak they are; none where it is not named.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        alpha: float,
        threshold: float,
        constants: Constants,
        least: Mapping[str, int] | None = None,
    ) -> None:
        self._model, self._skeletons = model, _skeletons(model, names)
        self._alpha, self._threshold, self._constants, self._least = alpha, threshold, constants, least or {}

    @torch.no_grad()
    def __call__(self, step: int, memory: dict[str, Tensor]) -> None:
        for name, skeleton in self._skeletons:
            strength, alive = skeleton.strength, skeleton.alive
            skeleton.kill_weak(self._threshold, self._least.get(name, 0))
            strength.mul_(alive)  # momentum may have moved the dead
            if strength.grad is not None:
                strength.grad.add_(strength.sign(), alpha=self._alpha).mul_(alive)
            dead = ~alive.flatten(1).any(1)
            for parameter in self._constants.get(name, ()):
                constant = self._model.get_parameter(parameter)
                constant[dead] = 0
                if constant.grad is not None:
                    constant.grad[dead] = 0


@torch.no_grad()
def detach(
    model: nn.Module,
    names: Iterable[str],
    threshold: float,
    constants: Constants,
    least: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Absorbs I into the weights under their old names; returns the masks of stripes and of dead filters' constants.

    Args: as of `Shrinkage`.
    """
    masks: dict[str, Tensor] = {}
    for name, skeleton in _skeletons(model, list(names)):
        skeleton.kill_weak(threshold, (least or {}).get(name, 0))
        masks[name] = skeleton.alive.clone()
        parametrize.remove_parametrizations(target(model, name).module, "weight", leave_parametrized=True)
        living = masks[name].flatten(1).any(1)
        for parameter in constants.get(name, ()):
            if not living.all():
                model.get_parameter(parameter)[~living] = 0
                masks[parameter] = living
    return masks
