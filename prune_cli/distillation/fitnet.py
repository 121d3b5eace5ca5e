"""FitNets: the student's hidden features, seen through a small regressor, become those of its teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.distillation.distillation import Outputs
from prune_cli.errors import ConfigError


class FitNet(nn.Module):
    """sum_j mean (r_j(student's feature j) - teacher's feature j)^2, with a 1x1 convolution r_j per feature.

    Romero et al., ICLR 2015 (arXiv:1412.6550), eq. 3, as a mean over all elements instead of half their sum, so that its
    weight does not depend on the size of maps. The regressors stand for the paper's convolutional ones where maps have
    one size; features without a map, (batch, units), get a linear layer. The paper trains with the hint of the middle
    layer first and with soft targets afterwards; here both may be terms of one training.

    Args:
        student: of a few images, for the numbers of channels.
        teacher: the same of the teacher.

    Raises:
        ConfigError: there are no features, or they are neither maps nor vectors, or maps of different sizes.
    """

    def __init__(self, student: Outputs, teacher: Outputs) -> None:
        super().__init__()
        if not student.features:
            raise ConfigError("hints are features; give features=auto or a list of modules")
        pairs = [(name, own, teacher.features[name]) for name, own in student.features.items()]
        self.regressors = nn.ModuleList(_regressor(name, own, hint) for name, own, hint in pairs)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """The term; regressors are in the order of the features."""
        errors = [
            F.mse_loss(regressor(own).to(own.dtype), teacher.features[name])
            for regressor, (name, own) in zip(self.regressors, student.features.items(), strict=True)
        ]
        return torch.stack(errors).sum()


def _regressor(name: str, own: Tensor, hint: Tensor) -> nn.Module:
    if own.dim() != hint.dim() or own.dim() not in (2, 4) or own.shape[2:] != hint.shape[2:]:
        raise ConfigError(
            f"hints are compared on maps of one size or on vectors, but {name!r} gives {tuple(own.shape)} and its "
            f"teacher's {tuple(hint.shape)}; name other modules"
        )
    channels = own.shape[1], hint.shape[1]
    return nn.Conv2d(*channels, 1, dtype=own.dtype) if own.dim() == 4 else nn.Linear(*channels, dtype=own.dtype)
