"""Synaptic flow: how much of a network's total flow passes each weight, measured without any data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prune_cli.errors import ConfigError
from prune_cli.structure.modes import composed_attention, evaluating

LINEAR_NORMS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm,
)  # fmt: skip


def synaptic_flow(model: nn.Module, example_inputs: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """theta * dR/dtheta with R = sum of the outputs for an image of ones (Tanaka et al., arXiv:2006.05467, eq. 3).

    Parameters are replaced by their absolute values, biases by 0 and norms by the identity, and the pass is in float64
    where the device has it. Without nonlinear operators between positive numbers the scores of a layer that all flow
    must pass then sum to R, which is divided out: layers have sum 1, and a shortcut takes its part from a branch.

    Args:
        example_inputs: (n, ...); only the shape counts.
        names: weights to score, by parameter name.

    Returns:
        Parameter name -> scores like the weight, in [0, 1].

    Raises:
        ConfigError: the flow is 0 or not finite, or some of it runs backwards: attention, for example, is no operator
            that hands on a share of what it is given.
    """
    dtype = torch.float32 if example_inputs.device.type == "mps" else torch.float64
    parameters: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to(dtype, copy=True)
        parameters[name] = value.zero_() if name.rpartition(".")[2].endswith("bias") else value.abs_()
    for name in names:
        parameters[name].requires_grad_(True)
    buffers = {
        name: buffer.to(dtype) if buffer.is_floating_point() else buffer for name, buffer in model.named_buffers()
    }
    ones = torch.ones_like(example_inputs[:1], dtype=dtype)
    with evaluating(model), composed_attention(), _without_norms(model), torch.enable_grad():
        outputs = torch.func.functional_call(model, parameters | buffers, (ones,))
        flow = outputs.sum()
        found = torch.autograd.grad(flow, [parameters[name] for name in names], allow_unused=True)
    total = flow.detach()
    if not bool(total.isfinite()) or float(total) <= 0:
        raise ConfigError(
            f"criterion: the synaptic flow through the network is {float(total)}, which cannot be shared out; "
            "choose another criterion"
        )
    shares = {
        name: torch.zeros_like(parameters[name]) if gradient is None else parameters[name].detach() * gradient / total
        for name, gradient in zip(names, found, strict=True)
    }
    backwards = [name for name, share in shares.items() if not bool(share.min() >= -1e-6)]
    if backwards:
        raise ConfigError(
            f"criterion: needs a network whose operators only hand flow on, but that through {backwards[0]} is negative; "
            "choose another criterion"
        )
    return shares


@contextmanager
def _without_norms(model: nn.Module) -> Iterator[None]:
    """Norms hand on what they are given."""
    handles = [
        module.register_forward_hook(lambda module, inputs, output: inputs[0])
        for module in model.modules()
        if isinstance(module, LINEAR_NORMS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
