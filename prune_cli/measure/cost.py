"""What a network costs and how well it does: params, MACs, bytes, latency, accuracy.

MACs count one multiply-add as 1, in convolutions, linear layers and matrix products (attention included);
norms, activations, poolings and additions count 0. Parameters and their MACs are counted twice, in full and
by what is not zero: with masks, a masked weight is zero whatever its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from prune_cli.measure.macs import MacCounter
from prune_cli.structure.interpreter import Example
from prune_cli.structure.modes import composed_attention, evaluating
from prune_cli.structure.originals import Originals
from prune_cli.structure.prunable import owner

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a model


@dataclass(frozen=True)
class LayerCost:
    """Cost of one module for the given input: what it owns itself, not what its children own.

    `weight_shape` is that of its parameter `weight` (None without one), `output_shape` that of its
    last output (empty where that is not one tensor). `weights` are the parameters without biases.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...]
    params: int
    params_nonzero: int
    weights: int
    weights_nonzero: int
    macs: int
    macs_nonzero: int

    @property
    def sparsity(self) -> float:
        """Fraction of the parameters that are zero, 0 where there are none."""
        return 1 - self.params_nonzero / self.params if self.params else 0.0


@dataclass(frozen=True)
class Cost:
    """Cost of a network for the given input; `bytes` is the memory of its parameters and buffers.

    `layers` are the modules that own parameters or multiply, in the order of `named_modules`; their
    params and MACs add up to those of the network (a tied parameter belongs to its first module).
    """

    params: int
    params_nonzero: int
    macs: int
    macs_nonzero: int
    bytes: int
    layers: tuple[LayerCost, ...]

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return 2 * self.macs

    @property
    def sparsity(self) -> float:
        """Fraction of all parameters that are zero."""
        return 1 - self.params_nonzero / self.params if self.params else 0.0


# ------------------------------------------------------------------------------------------------ parameters


def size_bytes(model: nn.Module) -> int:
    """Returns the bytes of parameters and buffers as they are in memory; tied ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))


def _masked(parameter: Tensor, name: str, masks: Mapping[str, Tensor] | None) -> Tensor:
    """Returns where the parameter is neither zero nor masked; without values (`meta`) none is zero."""
    if parameter.is_meta:
        alive = torch.ones_like(parameter, dtype=torch.bool, device="cpu")
    else:
        alive = parameter.detach() != 0
    if masks is not None and name in masks:
        alive &= masks[name].to(alive.device, torch.bool)
    return alive


def _nonzero(parameter: Tensor, name: str, masks: Mapping[str, Tensor] | None) -> int:
    return int(torch.count_nonzero(_masked(parameter, name, masks)))


# ------------------------------------------------------------------------------------------------ MACs


def cost(
    model: nn.Module,
    inputs: Sequence[int] | Example,
    masks: Mapping[str, Tensor] | None = None,
) -> Cost:
    """Counts parameters, MACs and bytes by one forward pass in eval mode, by shapes alone where they suffice.

    Args:
        model: the network, on `meta` too; unchanged afterwards.
        inputs: shape (C, H, W) of one example, or what to call the model with: a tensor, a tuple of positional
            arguments or a dict of keyword arguments. MACs are those of all examples in them.
        masks: boolean tensors by parameter name, True = keep, broadcastable to the parameter. A product
            with a parameter counts in `macs_nonzero` by the fraction of that parameter which is neither
            masked nor zero.
    """
    example = _examples(inputs)
    parameters = dict(model.named_parameters())
    try:
        counter, outputs = _count(model, example, masks, "meta")
    except (RuntimeError, TypeError, ValueError):
        # values that decide the path, or tensors that are no buffers: it has to run for real
        counter, outputs = _count(model, example, masks, None)
    owned: dict[str, list[str]] = {}
    for name in parameters:
        owned.setdefault(owner(name), []).append(name)
    layers = []
    for name, module in model.named_modules():
        names = owned.get(name, [])
        if not names and name not in counter.macs:
            continue
        weight = getattr(module, "weight", None)
        macs, macs_nonzero = counter.macs.get(name, (0, 0.0))
        nonzero = {key: _nonzero(parameters[key], key, masks) for key in names}
        weights = [key for key in names if not key.rpartition(".")[2].endswith("bias")]
        layers.append(
            LayerCost(
                name=name,
                kind=type(module).__name__,
                weight_shape=tuple(weight.shape) if isinstance(weight, Tensor) else None,
                output_shape=outputs.get(name, ()),
                params=sum(parameters[key].numel() for key in names),
                params_nonzero=sum(nonzero.values()),
                weights=sum(parameters[key].numel() for key in weights),
                weights_nonzero=sum(nonzero[key] for key in weights),
                macs=int(macs),
                macs_nonzero=round(macs_nonzero),
            )
        )
    return Cost(
        params=sum(layer.params for layer in layers),
        params_nonzero=sum(layer.params_nonzero for layer in layers),
        macs=sum(layer.macs for layer in layers),
        macs_nonzero=sum(layer.macs_nonzero for layer in layers),
        bytes=size_bytes(model),
        layers=tuple(layers),
    )


def _examples(inputs: Sequence[int] | Example) -> Arguments:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if all(isinstance(size, int) for size in inputs):
        return (torch.zeros(1, *inputs),), {}
    return tuple(inputs), {}


def _count(
    model: nn.Module, example: Arguments, masks: Mapping[str, Tensor] | None, device: str | None
) -> tuple[MacCounter, dict[str, tuple[int, ...]]]:
    """Runs the model under the counter, on its own tensors (device None) or on stand-ins without memory."""
    real = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {**real, **dict(model.named_buffers())}
    if device is not None:
        tensors = {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()}
        example = tree_map(lambda one: torch.empty_like(one, device=device) if torch.is_tensor(one) else one, example)
    else:
        home = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
        example = tree_map(lambda one: one.to(home) if torch.is_tensor(one) else one, example)
    owners = {tensors[name].untyped_storage()._cdata: name for name in reversed(real)}
    fractions: dict[tuple[Any, ...], float] = {}

    def alive(name: str, view: Tensor) -> float:
        stand_in = tensors[name]
        key = (name, tuple(view.shape), view.stride(), view.storage_offset())
        if key not in fractions:
            mask = _masked(real[name], name, masks)
            if mask.stride() == stand_in.stride():
                offset = view.storage_offset() - stand_in.storage_offset()
                mask = mask.as_strided(view.shape, view.stride(), offset)
            fractions[key] = int(torch.count_nonzero(mask)) / max(mask.numel(), 1)
        return fractions[key]

    counter = MacCounter(owners, alive)
    outputs: dict[str, tuple[int, ...]] = {}
    tracked = _tracked(model, counter.stack, outputs)
    with _restored(model), evaluating(model), composed_attention(), tracked, torch.no_grad():
        if device is None:
            with counter:
                model(*example[0], **example[1])
        else:
            with counter:
                functional_call(model, tensors, *example)
    return counter, outputs


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Puts back what modules keep of a forward pass, in attributes, lists and buffers: a cache on `meta`, or a count."""
    states = [(vars(module), dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    written = [(buffer, buffer.clone()) for buffer in model.buffers()]
    originals = Originals(tuple(model.named_modules()))
    for plain, *_ in states:
        originals.remember(plain)
    try:
        yield
    finally:
        originals.restore()
        for buffer, values in written:
            buffer.copy_(values)
        for plain, before, buffers in states:
            plain.clear()
            plain.update(before)
            plain["_buffers"].update(buffers)


@contextmanager
def _tracked(model: nn.Module, stack: list[str], outputs: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Keeps the name of the running module on top of `stack` and notes the shape of every output."""
    handles = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            stack.append(name)

        def leave(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
            stack.pop()
            if isinstance(out, Tensor):
                outputs[name] = tuple(out.shape)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
