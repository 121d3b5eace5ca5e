"""The one pass over calibration images that all data-driven criteria share.

Only running sums are kept: per channel in float64, per weight in the weight's own precision (at least float32), both on
the weight's device. No activation outlives the operator that made it. Everything summed is additive over images, so
several processes can each take a share of the batches and add their sums up; means are taken at the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli.criteria import sites as finding
from prune_cli.criteria.criterion import At, Need
from prune_cli.criteria.flow import synaptic_flow
from prune_cli.criteria.sites import LAYERS, Sites, TrackedOutput
from prune_cli.structure import prunable
from prune_cli.structure.modes import composed_attention, evaluating
from prune_cli.structure.prunable import output_axis

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> mean loss of the batch, a scalar."""

Statistics = dict[str, dict[str, Tensor]]
"""Parameter name -> need -> what was measured."""

RANK_ELEMENTS = 1 << 22  # entries of feature maps whose ranks are computed at a time


@dataclass(frozen=True)
class Calibration:
    """LayerSelector training images criteria see: fixed ones, classes as equal as possible, not augmented.

    Attributes:
        images: how many; all there are if there are fewer.
        batch_size: images per forward or backward pass.
    """

    images: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 64


class RunningSum:
    """A running sum and how many values it is of. Adding two processes' totals gives the total of both."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count: Tensor | None = None

    def add(self, value: Tensor, count: float) -> None:
        """Adds a value that is itself a sum over `count` values."""
        if self.sum is None or self.count is None:
            self.sum = torch.zeros_like(value)
            self.count = torch.zeros((), dtype=_wide(value.device), device=value.device)
        self.sum += value
        self.count += count

    def mean(self) -> Tensor:
        assert self.sum is not None and self.count is not None
        return self.sum / self.count.to(self.sum.dtype)


def not_positive(outputs: Tensor, axis: int) -> tuple[Tensor, int]:
    """How many of each channel's outputs a ReLU makes 0, and of how many: zeros, where a ReLU has come already."""
    return _per_channel((outputs <= 0).to(outputs.dtype), axis)


def positive_part(outputs: Tensor, axis: int) -> tuple[Tensor, int]:
    """The sum of each channel's outputs after a ReLU, and of how many."""
    return _per_channel(outputs.clamp_min(0), axis)


def ranks(outputs: Tensor, axis: int) -> tuple[Tensor, int]:
    """The sum of the matrix ranks of each channel's feature maps, and of how many maps.

    A map is (height, width) with numerical rank as in `torch.linalg.matrix_rank`; videos have one per frame, and where
    there is a line or a single number, its rank is 1 unless it is 0.
    """
    maps = outputs.movedim(axis, 1)
    batch, channels = maps.shape[:2]
    if maps.dim() < 4:
        return (maps.reshape(batch, channels, -1) != 0).any(2).sum(0).to(_wide(maps.device)), batch
    maps = maps.reshape(batch, channels, -1, *maps.shape[-2:])
    flat = maps.flatten(0, 2)
    at_once = max(1, RANK_ELEMENTS // flat[0].numel())
    found = torch.cat([torch.linalg.matrix_rank(part) for part in flat.split(at_once)])
    per_map = found.view(batch, channels, -1)
    return per_map.sum((0, 2)).to(_wide(maps.device)), batch * per_map.shape[2]


# What is taken of a layer's outputs: (values, channel axis) -> sum per channel, and how many values or maps each is of.
OUTPUTS: Mapping[str, Callable[[Tensor, int], tuple[Tensor, int]]] = {
    "not_positive": not_positive,
    "mean": positive_part,
    "rank": ranks,
}


@dataclass(frozen=True)
class GradientSample:
    """A layer's weight, the gradient of a batch's loss there, and per channel g * scale + g * shift of its norm."""

    weight: Tensor
    gradient: Tensor
    gate: Tensor
    axis: int


def _taylor(slope: GradientSample) -> Tensor:
    return (slope.gradient * slope.weight).square()


def _taylor_filter(slope: GradientSample) -> Tensor:
    products = (slope.gradient * slope.weight).movedim(slope.axis, 0).flatten(1)
    return products.sum(1, dtype=_wide(products.device)).square()


def _taylor_gate(slope: GradientSample) -> Tensor:
    return slope.gate.to(_wide(slope.gate.device)).square()


# What is taken of gradients, once per batch; `gradient` itself is weighted with the batch's images.
GRADIENT_SAMPLES: Mapping[str, Callable[[GradientSample], Tensor]] = {
    "taylor": _taylor,
    "taylor_filter": _taylor_filter,
    "taylor_gate": _taylor_gate,
}


def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    needs: Sequence[Need],
    loss: Loss,
    example_inputs: Tensor,
    *,
    at: At = "post_act",
    names: Sequence[str] | None = None,
    reduce: Callable[[Tensor], object] | None = None,
) -> Statistics:
    """Measures what `needs` name; see criterion.py for the list.

    The network runs in eval mode, so that norms use their running statistics: with those of the batch, scaling a filter
    in front of a norm would change nothing and (sum of g * w) would be 0 for every one. Parameters, their gradients,
    buffers and modes are as before afterwards.

    Args:
        batches: (images, labels); not touched when nothing needs images.
        loss: whose gradients are taken; a mean over the batch.
        example_inputs: one image, for finding where outputs are measured.
        at: where outputs are measured.
        names: weights of interest, by parameter name; all convolutions and linear layers by default.
        reduce: called on every sum and count, in the same order in every process, to add them up in place over
            processes that each saw a share of the images, at least one batch.

    Returns:
        Parameter name -> need -> tensor. Outputs of a layer that did not run are absent, and everything of a weight
        that is computed from other parameters; where the loss does not depend on a weight, its gradient is 0.

    Raises:
        ConfigError: the network's operators differ from batch to batch.
    """
    names = list(names) if names is not None else [f"{name}.weight" for name in prunable.layers(model)]
    chosen = [need for need in needs if need not in ("norm", "n_keep", "movement", "synaptic_flow")]
    found: Statistics = {name: {} for name in names}
    names = [name for name in names if isinstance(prunable.weight_of(model, name), nn.Parameter)]
    if "synaptic_flow" in needs:
        for name, value in synaptic_flow(model, example_inputs, names).items():
            found[name]["synaptic_flow"] = value
    if not chosen:
        return found
    totals = _totals(model, batches, chosen, loss, example_inputs, at, names)
    for total in totals.values():
        if reduce is not None and total.sum is not None and total.count is not None:
            reduce(total.sum)
            reduce(total.count)
    for (name, need), total in totals.items():
        if total.sum is not None:
            found[name][need] = _finished(model, name, need, total)
    return found


def _totals(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    needs: Sequence[str],
    loss: Loss,
    example_inputs: Tensor,
    at: At,
    names: Sequence[str],
) -> dict[tuple[str, str], RunningSum]:
    """The sums over all batches, not yet divided by anything."""
    totals = {(name, need): RunningSum() for name in names for need in needs}
    watched = [need for need in needs if need in OUTPUTS or need == "input_norm"]
    sloped = [need for need in needs if need in GRADIENT_SAMPLES or need == "gradient"]
    with evaluating(model), composed_attention():
        places = finding.find(model, example_inputs) if watched or "taylor_gate" in needs else Sites()
        for images, labels in batches:
            if watched:
                _watch(model, images, places, watched, at, totals)
            if sloped:
                _slopes(model, (images, labels), loss, places, sloped, totals)
            if "fisher" in needs:
                for image, label in zip(images.split(1), labels.split(1), strict=True):
                    for name, gradient in _gradients(model, loss, image, label, names).items():
                        totals[name, "fisher"].add(gradient.square(), 1)
    return totals


def _watch(
    model: nn.Module,
    images: Tensor,
    places: Sites,
    needs: Sequence[str],
    at: At,
    totals: dict[tuple[str, str], RunningSum],
) -> None:
    """One forward pass, measured operator by operator."""
    measured = {name for name, _ in totals}
    asked = [need for need in needs if need in OUTPUTS]

    def layer(trail: TrackedOutput, name: str, args: tuple[Any, ...], result: Any) -> None:
        if "input_norm" in needs and trail.weight in measured:
            weight = model.get_parameter(trail.weight)
            totals[trail.weight, "input_norm"].add(_input_squares(name, args, result, weight), 1)

    def outputs(trail: TrackedOutput) -> bool:
        if trail.weight in measured:
            for need in asked:
                totals[trail.weight, need].add(*OUTPUTS[need](trail.values, trail.axis))
        return False

    finding.measure(model, images, places, at, layer, outputs)


def _input_squares(name: str, args: tuple[Any, ...], result: Tensor, weight: Tensor) -> Tensor:
    """Sum over images and positions of the squared inputs that each weight meets: (in_channels, *kernel)."""
    source = args[LAYERS[name][0]].detach()
    if name != "convolution":
        return source.flatten(0, -2).square().sum(0, dtype=_wide(source.device))
    stride, padding, dilation, transposed = args[3], args[4], args[5], args[6]
    kernel = weight.shape[2:]
    squares = source.square()
    if not transposed:
        squares = nn.functional.pad(squares, [side for p in reversed(padding) for side in (p, p)])
    total = squares.new_zeros((source.shape[1], *kernel), dtype=_wide(source.device))
    for place in itertools.product(*(range(size) for size in kernel)):
        window = tuple(
            _met(at, s, p, d, source.shape[2 + axis], result.shape[2 + axis], transposed)
            for axis, (at, s, p, d) in enumerate(zip(place, stride, padding, dilation, strict=True))
        )
        part = squares[(slice(None), slice(None), *window)]
        total[(slice(None), *place)] = part.sum([0, *range(2, part.dim())], dtype=total.dtype)
    return total


def _met(at: int, stride: int, padding: int, dilation: int, size: int, outputs: int, transposed: bool) -> slice:
    """LayerSelector inputs along one axis a kernel position multiplies: of the padded ones, or of a transposed layer's own."""
    start = at * dilation
    if not transposed:
        return slice(start, start + (outputs - 1) * stride + 1, stride)
    # Input i lands on output i * stride - padding + start, unless that is cut off.
    first = max(0, -((start - padding) // stride))
    last = min(size - 1, (outputs - 1 + padding - start) // stride)
    return slice(first, max(first, last + 1))


def _slopes(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    loss: Loss,
    places: Sites,
    needs: Sequence[str],
    totals: dict[tuple[str, str], RunningSum],
) -> None:
    """One backward pass."""
    images, labels = batch
    names = list(dict.fromkeys(name for name, _ in totals))
    norms = {name: places.norm_of(name) or (None, None) for name in names} if "taylor_gate" in needs else {}
    wanted = [*names, *(part for pair in norms.values() for part in pair if part is not None)]
    gradients = _gradients(model, loss, images, labels, list(dict.fromkeys(wanted)))
    for name in names:
        axis = output_axis(model, name)
        weight = model.get_parameter(name).detach()
        gate = weight.new_zeros(weight.shape[axis])
        for part in norms.get(name, ()):
            if part is not None:
                gate = gate + gradients[part] * model.get_parameter(part).detach()
        slope = GradientSample(weight, gradients[name], gate, axis)
        for need in needs:
            if need == "gradient":
                totals[name, need].add(slope.gradient * len(images), len(images))
            else:
                totals[name, need].add(GRADIENT_SAMPLES[need](slope), 1)


def _gradients(model: nn.Module, loss: Loss, images: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Gradients of the batch's mean loss, without touching those that parameters carry; 0 where it does not depend."""
    parameters = [model.get_parameter(name) for name in names]
    with _differentiable(parameters), torch.enable_grad():
        value = loss(model, images, labels)
        found = torch.autograd.grad(value, parameters, allow_unused=True)
    precise = (torch.promote_types(parameter.dtype, torch.float32) for parameter in parameters)
    return {
        name: torch.zeros_like(parameter, dtype=dtype) if gradient is None else gradient.to(dtype)
        for name, parameter, gradient, dtype in zip(names, parameters, found, precise, strict=True)
    }


@contextmanager
def _differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets frozen parameters have gradients for a while."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _finished(model: nn.Module, name: str, need: str, total: RunningSum) -> Tensor:
    """Sums turned into what the criteria read."""
    assert total.sum is not None
    weight, axis = model.get_parameter(name), output_axis(model, name)
    if need == "input_norm":
        norms = total.sum.sqrt()
        if axis == 1:
            return norms.unsqueeze(1)
        groups = max(1, norms.shape[0] // weight.shape[1])
        if groups == 1:
            return norms.unsqueeze(0)
        return norms.view(groups, *weight.shape[1:]).repeat_interleave(weight.shape[0] // groups, 0)
    if need in OUTPUTS:
        # Groups of a transposed convolution share the positions of the weight's second axis.
        return total.mean().view(-1, weight.shape[axis]).mean(0)
    return total.mean() if need in ("gradient", "fisher") else total.sum


def _per_channel(values: Tensor, axis: int) -> tuple[Tensor, int]:
    others = [other for other in range(values.dim()) if other != axis]
    return values.sum(others, dtype=_wide(values.device)), values.numel() // values.shape[axis]


def _wide(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
