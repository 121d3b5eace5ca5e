"""Trained weight sharing: a layer's weights are a few centroids, which are what an optimizer trains (arXiv:1510.00149).

While a network is attached, the parameter of a shared weight is its codebook: members of a cluster stay equal and
zeros stay zero whatever the optimizer, its momentum or its weight decay do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prune_cli.compression.kmeans import Clustered, centroid_gradient
from prune_cli.structure.prunable import target


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codebook: Tensor, numbers: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(numbers, places)
        ctx.clusters = len(codebook)
        return codebook.new_zeros(shape.numel()).index_copy_(0, places, codebook[numbers]).view(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        numbers, places = ctx.saved_tensors
        return centroid_gradient(gradients[0].flatten()[places], numbers, ctx.clusters), None, None, None


class Centroids(nn.Module):
    """A parametrisation: codebook -> weight, w = codebook[assignment], zero where nothing is assigned.

    Args:
        shared: the clustered weight. Its assignment is no buffer: it never changes, and a resumed stage finds it again.
    """

    def __init__(self, shared: Clustered) -> None:
        super().__init__()
        flat = shared.assignment.flatten()
        self._places = torch.nonzero(flat >= 0).flatten()
        self._numbers = flat[self._places]
        self._shape, self._codebook = shared.assignment.shape, shared.codebook

    def forward(self, codebook: Tensor) -> Tensor:
        return _Spread.apply(codebook, self._numbers, self._places, self._shape)  # type: ignore[no-any-return]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The codebook to begin with."""
        return self._codebook.clone()


def attach(model: nn.Module, shared: Mapping[str, Clustered]) -> None:
    """Lets a network compute with shared weights, in place, and train their centroids; `detach` ends it."""
    for name, layer in shared.items():
        module = target(model, name).module
        parametrize.register_parametrization(module, "weight", Centroids(layer), unsafe=True)


@torch.no_grad()
def detach(model: nn.Module, names: Iterable[str]) -> None:
    """Leaves the shared weights as plain parameters of the old names."""
    for name in names:
        module: Any = target(model, name).module
        module.parametrizations.weight.original.add_(0.0)  # a centroid of -0.0 would be stored as a value
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
