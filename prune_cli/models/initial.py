"""The initial weights of the networks in this package."""

from __future__ import annotations

import torch
from torch import nn


def initialise(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draws new weights in place, in the order of the modules; None is PyTorch's default generator.

    Convolutions: Kaiming normal over the fan-out, for ReLU (He et al., arXiv:1502.01852, Eq. 14), biases 0.
    Batch norms: weight 1, bias 0, statistics reset. Linear layers: normal with deviation 0.01, biases 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
