"""Modes that a network runs in for a while: evaluation, and attention composed of plain operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def composed_attention() -> Iterator[None]:
    """Switches off the fused inference path of `nn.MultiheadAttention`, which hides its products."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode and afterwards every module back in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def norms_by_batch(model: nn.Module) -> Iterator[None]:
    """Lets norms with running statistics divide by those of the images in eval mode; their own stay as they are."""
    kept = [
        (module, module.running_mean, module.running_var)
        for module in model.modules()
        if isinstance(module, _NormBase) and module.running_mean is not None
    ]
    try:
        for module, _, _ in kept:
            module.running_mean = module.running_var = None
        yield
    finally:
        for module, mean, variance in kept:
            module.running_mean, module.running_var = mean, variance
