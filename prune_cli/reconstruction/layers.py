"""A layer's inputs as columns, and two networks that run side by side up to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from prune_cli.structure.modes import composed_attention, evaluating
from prune_cli.structure.prunable import owner

Convolution = nn.Conv1d | nn.Conv2d
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Begins a pass over the calibration images."""


class _ReachedError(Exception):
    """The layer has run: nothing behind it is needed."""


@dataclass(frozen=True)
class Moments:
    """Sums over the columns of a layer's inputs, per group of a grouped convolution, in float64.

    A layer with a bias has one input more, the last, which is always 1.

    Attributes:
        gram: (groups, k, k), sum of x x^T.
        cross: (groups, rows, k), sum of y x^T for the outputs y that are wanted.
    """

    gram: Tensor
    cross: Tensor


def in_order(model: nn.Module, example_inputs: Tensor) -> list[str]:
    """Weights of the layers that can be given other weights, by parameter name, in the order in which they run.

    These are 1-D and 2-D convolutions and linear layers that are called as modules, once for an image, and own a plain
    weight that no other layer has.
    """
    calls: Counter[str] = Counter()
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    with evaluating(model), composed_attention(), torch.no_grad(), _hooks() as handles:
        for name, module in model.named_modules():
            if type(module) in (nn.Conv1d, nn.Conv2d, nn.Linear) and not is_parametrized(module):
                weight = module.get_parameter("weight") if "weight" in module._parameters else None
                if weight is not None and shared[id(weight)] == 1:
                    key = f"{name}.weight" if name else "weight"
                    handles.append(module.register_forward_hook(lambda *_, key=key: calls.update([key])))
        model(example_inputs)
    return [key for key, count in calls.items() if count == 1]


def measured(
    model: nn.Module,
    dense: nn.Module,
    name: str,
    batches: Batches,
    rows: Tensor | None,
    reduce: Callable[[Tensor], object] | None = None,
) -> Moments:
    """The moments of a layer's inputs in one network, and of its outputs in the other one.

    Args:
        model: whose inputs.
        dense: whose outputs; it has a module of the same name.
        name: of the weight.
        batches: of images.
        rows: which of the outputs, in the order of the rows of the model's layer; None = all.
        reduce: adds a sum up over processes in place.
    """
    module = model.get_submodule(owner(name))
    gram = cross = None
    with evaluating(model), evaluating(dense), composed_attention(), torch.no_grad():
        for images, _ in batches():
            x = columns(module, _run_to(model, owner(name), images)[0])
            wanted = _run_to(dense, owner(name), images)[1]
            if rows is not None:
                wanted = wanted.index_select(-1 if isinstance(module, nn.Linear) else 1, rows.to(wanted.device))
            y = outputs(module, wanted).to(x.dtype)
            if gram is None or cross is None:
                gram = x.new_zeros(len(x), x.shape[1], x.shape[1], dtype=torch.float64)
                cross = x.new_zeros(len(x), y.shape[1], x.shape[1], dtype=torch.float64)
            gram += (x @ x.mT).double()
            cross += (y @ x.mT).double()
    assert gram is not None and cross is not None, "there is at least one batch"
    for total in (gram, cross) if reduce is not None else ():
        assert reduce is not None
        reduce(total)
    return Moments(gram, cross)


def columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """(groups, k, n): every column that the layer multiplies with its rows, with a last 1 where it has a bias."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        flat = isinstance(module, nn.Conv1d)
        kernel, dilation, stride = (
            (1, *sizes) if flat else sizes for sizes in (module.kernel_size, module.dilation, module.stride)
        )
        found = F.unfold(padded.unsqueeze(2) if flat else padded, kernel, dilation, 0, stride)
        n, length = len(found), found.shape[2]
        found = found.view(n, module.groups, -1, length).permute(1, 2, 0, 3).flatten(2)
    else:
        found = inputs.reshape(-1, inputs.shape[-1]).T.unsqueeze(0)
    if getattr(module, "bias", None) is not None:
        found = torch.cat([found, found.new_ones(len(found), 1, found.shape[2])], 1)
    return found


def outputs(module: nn.Module, values: Tensor) -> Tensor:
    """(groups, rows, n): what the layer made of those columns."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return values.unflatten(1, (module.groups, -1)).flatten(3).permute(1, 2, 0, 3).flatten(2)
    return values.reshape(-1, values.shape[-1]).T.unsqueeze(0)


def as_rows(module: nn.Module) -> Tensor:
    """(groups, rows, k): weights, with the bias as the last of a row where there is one; a copy."""
    weight = module.get_parameter("weight").detach()
    groups = getattr(module, "groups", 1)
    found = weight.reshape(groups, len(weight) // groups, -1)
    bias: Tensor | None = getattr(module, "bias", None)
    return found.clone() if bias is None else torch.cat([found, bias.detach().view(groups, -1, 1)], 2)


def keep_rows(module: nn.Module, mask: Tensor | None, bias_mask: Tensor | None = None) -> Tensor:
    """(groups, rows, k) bool: what of a row may be other than zero, by the masks of weight and bias."""
    weight = module.get_parameter("weight")
    groups = getattr(module, "groups", 1)
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.to(weight.device).expand_as(weight)
    found = mask.reshape(groups, len(weight) // groups, -1)
    if getattr(module, "bias", None) is None:
        return found.clone()
    last = found.new_ones(len(weight)) if bias_mask is None else bias_mask.to(weight.device)
    return torch.cat([found, last.view(groups, -1, 1)], 2)


def set_rows(module: nn.Module, rows: Tensor) -> None:
    """The inverse of `as_rows`."""
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    with torch.no_grad():
        if bias is not None:
            bias.copy_(rows[..., -1].reshape(-1))
            rows = rows[..., :-1]
        weight.copy_(rows.reshape(weight.shape))


def _run_to(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's input and output; the network does not run on behind it."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append((args[0], output))
        raise _ReachedError

    with _hooks() as handles:
        handles.append(model.get_submodule(layer).register_forward_hook(hook))
        with suppress(_ReachedError):
            model(images)
    return seen[0]


@contextmanager
def _hooks() -> Iterator[list[torch.utils.hooks.RemovableHandle]]:
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
