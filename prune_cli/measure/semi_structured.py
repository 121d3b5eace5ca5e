"""2:4 weights on GPUs that multiply them faster: which layers qualify, how long they take, and why others do not.

PyTorch multiplies semi-structured weights (two of every four along the inputs are zero) in linear layers, in half
precision, on NVIDIA GPUs from Ampere on. Convolutions need an engine such as TensorRT, which finds the zeros in an ONNX
file by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from prune_cli.structure import modes
from prune_cli.structure.prunable import owner

AMPERE = (8, 0)  # the first compute capability with sparse tensor cores


@dataclass(frozen=True)
class Timing:
    """One layer with 2:4 weights.

    Attributes:
        semi_structured: `converted`, or why not.
        latency_half_ms: milliseconds of the dense layer in float16 on the network's own inputs; None where not run.
        latency_semi_structured_ms: the same with converted weights.
        semi_structured_error: largest difference of the outputs over the largest output.
    """

    semi_structured: str
    latency_half_ms: float | None = None
    latency_semi_structured_ms: float | None = None
    semi_structured_error: float | None = None


def two_of_four(mask: Tensor) -> bool:
    """Whether at most two of every four consecutive inputs stay: axis 1 of a weight's mask, the last group padded."""
    if mask.dim() < 2:
        return False
    kept = nn.functional.pad(mask.movedim(1, -1).to(torch.uint8), (0, -mask.shape[1] % 4))
    return bool((kept.unflatten(-1, (-1, 4)).sum(-1) <= 2).all())


def timings(model: nn.Module, masks: Mapping[str, Tensor], images: Tensor) -> dict[str, Timing]:
    """The layers whose masks are 2:4, by name: converted and timed where the GPU can, else the reason.

    Args:
        model: unchanged; in eval mode.
        images: a batch on the network's device; layers are timed on the inputs that they get from it.
    """
    weights = dict(model.named_parameters())
    names = [
        owner(name)
        for name, mask in masks.items()
        if name.endswith(".weight") and two_of_four(mask.expand_as(weights[name]))
    ]
    if not names:
        return {}
    inputs = _inputs(model, names, images) if why_not(images.device) is None else {}
    return {name: _timing(model.get_submodule(name), inputs.get(name), images.device) for name in names}


def why_not(device: torch.device) -> str | None:
    """Why this device has no sparse tensor cores, or None where it has."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU of compute capability {'.'.join(map(str, AMPERE))} or more, ran on {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < AMPERE:
        return f"needs compute capability {'.'.join(map(str, AMPERE))} or more, this GPU has {capability}"
    return None


def _timing(layer: nn.Module, inputs: Tensor | None, device: torch.device) -> Timing:
    if not isinstance(layer, nn.Linear):
        return Timing(f"{type(layer).__name__}: PyTorch has it for linear layers only; export to ONNX for TensorRT")
    if reason := why_not(device):
        return Timing(reason)
    if inputs is None:
        return Timing("the layer did not run")
    dense = copy.deepcopy(layer).half()
    sparse = copy.deepcopy(dense)
    example = inputs.half().flatten(0, -2)
    try:
        sparse.weight = nn.Parameter(to_sparse_semi_structured(dense.weight.detach()), requires_grad=False)
        with torch.inference_mode():
            expected, found = dense(example), sparse(example)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # sizes that the kernels do not take
        return Timing(" ".join(str(error).split())[:200])
    off = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return Timing("converted", _median(dense, example), _median(sparse, example), off)


def _median(layer: nn.Module, example: Tensor) -> float:
    from torch.utils.benchmark import Timer  # warns where there is a CUDA compiler and no GPU

    with torch.inference_mode():
        timer = Timer("layer(example)", globals={"layer": layer, "example": example})
        return 1e3 * timer.blocked_autorange(min_run_time=0.1).median


@torch.no_grad()
def _inputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """What each of these layers is given in a forward pass."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, args[0].detach())

        return keep

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        with modes.evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found
