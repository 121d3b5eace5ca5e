"""Statistics of batch norms, measured again after weights have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune_cli.errors import DataError
from prune_cli.progress import track
from prune_cli.structure.modes import evaluating

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_statistics(model: nn.Module) -> bool:
    """Whether any batch norm of a network keeps running statistics."""
    return any(isinstance(module, BATCH_NORMS) and module.track_running_stats for module in model.modules())


def recalibrate_bn(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Replaces the running statistics of every batch norm by their mean over `batches` of training images.

    Each batch counts the same. Norms run in train mode, everything else (dropout) in eval mode; weights,
    momentum and modes are what they were afterwards.

    Args:
        only: says of a norm's name whether it is meant; the others run in eval mode.

    Raises:
        DataError: if there is no batch; the statistics are unchanged then.
    """
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and only(name)
    ]
    iterator, length = iter(batches), getattr(batches, "__len__", None)
    first = next(iterator, None)
    if first is None:
        raise DataError("no images to recalibrate batch norms on")
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # PyTorch's name for the cumulative average
                norm.training = True
            for batch in track(chain([first], iterator), "estimating norm statistics", length() if length else None):
                model((batch if isinstance(batch, Tensor) else batch[0]).to(device, non_blocking=True))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
