"""What a network costs and how well it does: params, MACs, bytes, latency, accuracy.

MACs count one multiply-add as 1, in convolutions, linear layers and matrix products (attention included);
norms, activations, poolings and additions count 0. Parameters and their MACs are counted twice, in full and
by what is not zero: with masks, a masked weight is zero whatever its value.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from prune_cli.errors import DataError
from prune_cli.macs import MacCounter


@dataclass(frozen=True)
class LayerCost:
    """Cost of one module for the given input: what it owns itself, not what its children own.

    ``weight_shape`` is that of its parameter ``weight`` (None without one), ``output_shape`` that of its
    last output (empty where that is not one tensor).
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...]
    params: int
    params_nonzero: int
    macs: int
    macs_nonzero: int

    @property
    def sparsity(self) -> float:
        """Fraction of the parameters that are zero, 0 where there are none."""
        return 1 - self.params_nonzero / self.params if self.params else 0.0


@dataclass(frozen=True)
class Cost:
    """Cost of a network for the given input; ``bytes`` is the memory of its parameters and buffers.

    ``layers`` are the modules that own parameters or multiply, in the order of ``named_modules``; their
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


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass; ``throughput`` is examples per second at the median."""

    median_ms: float
    p95_ms: float
    throughput: float
    batch_size: int
    device: str
    dtype: str
    threads: int
    repeats: int


@dataclass(frozen=True)
class Metrics:
    """Counts of right answers (best guess, among the five best) of ``total``; acc in percent, mean loss."""

    correct: int
    correct5: int
    total: int
    loss: float

    @property
    def acc1(self) -> float:
        """Percentage whose best guess is right."""
        return 100 * self.correct / self.total

    @property
    def acc5(self) -> float:
        """Percentage whose class is among the five best guesses (100 with at most five classes)."""
        return 100 * self.correct5 / self.total


# ------------------------------------------------------------------------------------------------ parameters


def params(model: nn.Module) -> int:
    """Returns the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def params_nonzero(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> int:
    """Returns the number of parameters that are neither masked nor zero; tied ones count once.

    Args:
        model: The network.
        masks: Boolean tensors by parameter name, True = keep, broadcastable to the parameter.
    """
    return sum(_nonzero(parameter, name, masks) for name, parameter in model.named_parameters())


def size_bytes(model: nn.Module) -> int:
    """Returns the bytes of parameters and buffers as they are in memory; tied ones count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))


def _masked(parameter: Tensor, name: str, masks: Mapping[str, Tensor] | None) -> Tensor:
    """Returns where the parameter is neither zero nor masked; without values (``meta``) none is zero."""
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
    inputs: Sequence[int] | Tensor | Sequence[Tensor],
    masks: Mapping[str, Tensor] | None = None,
) -> Cost:
    """Counts parameters, MACs and bytes by one forward pass in eval mode, by shapes alone where they suffice.

    Args:
        model: The network, on ``meta`` too; unchanged afterwards.
        inputs: Shape (C, H, W) of one example, or the tensor or tensors to call the model with. MACs are
            those of all examples in them.
        masks: Boolean tensors by parameter name, True = keep, broadcastable to the parameter. A product
            with a parameter counts in ``macs_nonzero`` by the fraction of that parameter which is neither
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
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    layers = []
    for name, module in model.named_modules():
        names = owned.get(name, [])
        if not names and name not in counter.macs:
            continue
        weight = getattr(module, "weight", None)
        macs, macs_nonzero = counter.macs.get(name, (0, 0.0))
        layers.append(
            LayerCost(
                name=name,
                kind=type(module).__name__,
                weight_shape=tuple(weight.shape) if isinstance(weight, Tensor) else None,
                output_shape=outputs.get(name, ()),
                params=sum(parameters[key].numel() for key in names),
                params_nonzero=sum(_nonzero(parameters[key], key, masks) for key in names),
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


def _examples(inputs: Sequence[int] | Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    tensors = tuple(item for item in inputs if isinstance(item, Tensor))
    if tensors:
        return tensors
    return (torch.zeros(1, *(int(size) for size in inputs if isinstance(size, int))),)


def _count(
    model: nn.Module, example: Sequence[Tensor], masks: Mapping[str, Tensor] | None, device: str | None
) -> tuple[MacCounter, dict[str, tuple[int, ...]]]:
    """Runs the model under the counter, on its own tensors (device None) or on stand-ins without memory."""
    real = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {**real, **dict(model.named_buffers())}
    if device is not None:
        tensors = {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()}
        example = [torch.empty_like(tensor, device=device) for tensor in example]
    else:
        home = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
        example = [tensor.to(home) for tensor in example]
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
    with evaluating(model), composed_attention(), _tracked(model, counter.stack, outputs), torch.no_grad():
        if device is None:
            with counter:
                model(*example)
        else:
            with counter:
                functional_call(model, tensors, tuple(example))
    return counter, outputs


@contextmanager
def _tracked(model: nn.Module, stack: list[str], outputs: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Keeps the name of the running module on top of ``stack`` and notes the shape of every output."""
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


@contextmanager
def composed_attention() -> Iterator[None]:
    """Switches off the fused inference path of ``nn.MultiheadAttention``, which hides its products."""
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


# ------------------------------------------------------------------------------------------------ time


def latency(
    model: nn.Module,
    batch: Tensor,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    warmup: int = 5,
    repeats: int = 30,
) -> Latency:
    """Times forward passes in eval mode, each by itself, on a copy of the model.

    Args:
        model: The network; unchanged.
        batch: Input (N, ...).
        device: Where to run.
        dtype: Floating point type of weights and input.
        threads: CPU threads of PyTorch while it runs.
        warmup: Passes that are not timed.
        repeats: Passes that are timed, at least 1.

    Returns:
        Median and 95th percentile in milliseconds, and examples per second at the median.
    """
    place = torch.device(device)
    twin = copy.deepcopy(model).to(place, dtype).eval()
    example = batch.to(place, dtype if batch.is_floating_point() else None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times = []
    try:
        with torch.inference_mode():
            for step in range(warmup + max(1, repeats)):
                _synchronise(place)
                start = time.perf_counter()
                twin(example)
                _synchronise(place)
                if step >= warmup:
                    times.append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    times.sort()
    median = statistics.median(times)
    return Latency(
        median_ms=median,
        p95_ms=times[math.ceil(0.95 * len(times)) - 1],
        throughput=1e3 * len(batch) / median,
        batch_size=len(batch),
        device=str(place),
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        repeats=len(times),
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# ------------------------------------------------------------------------------------------------ accuracy


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Metrics:
    """Counts right answers over all examples of ``batches``, in eval mode and without gradients.

    Args:
        model: Network from images to logits (N, classes), or to something with an attribute ``logits``.
        batches: (images, classes) of any sizes; every example counts once.
        loss: Function of logits and classes returning the mean over the batch; None for cross-entropy.
            Summed in float64, weighted by the size of the batch.

    Raises:
        DataError: If there is no example, or a class that the network does not have.
    """
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    correct = correct5 = total = 0
    loss_sum = 0.0
    with evaluating(model), torch.no_grad():
        for images, target in batches:
            if len(target) == 0:
                continue
            target = target.to(device, non_blocking=True)
            output = model(images.to(device, non_blocking=True))
            logits = (output if isinstance(output, Tensor) else output.logits).float()
            if int(target.max()) >= logits.shape[1]:
                raise DataError(f"class {int(target.max())} in the data, the network has {logits.shape[1]} outputs")
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
            correct += int((logits.argmax(1) == target).sum())
            correct5 += int(best.any(1).sum())
            total += len(target)
            if loss is None:
                losses = F.cross_entropy(logits, target, reduction="none")
                loss_sum += float(losses.cpu().double().sum())
            else:
                loss_sum += float(loss(logits, target)) * len(target)
    if total == 0:
        raise DataError("no examples to evaluate on")
    return Metrics(correct, correct5, total, loss_sum / total)


def recalibrate_bn(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Replaces the running statistics of every batch norm by their mean over ``batches`` of training images.

    Each batch counts the same. Norms run in train mode, everything else (dropout) in eval mode; weights,
    momentum and modes are what they were afterwards.

    Raises:
        DataError: If there is no batch; the statistics are unchanged then.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    iterator = iter(batches)
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
            for batch in chain([first], iterator):
                model((batch if isinstance(batch, Tensor) else batch[0]).to(device, non_blocking=True))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
