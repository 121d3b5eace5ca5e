"""The one table of what criteria can ask for besides weights: where it comes from, its shape, how it is measured.

A criterion names its needs, in its option file or in Python. Everything else is computed from the entries: whether images
must be there, which networks are legal, what is collected and how it is summed. So a new statistic is one function and one
entry in `NEEDS`, or a `Need` of one's own that is given to `Criterion.needs` as it is; in YAML, an entry
`_target_: my_module.my_need` that names a function without arguments which returns one.

What `take` is given, and what it returns, depends on the source:

    outputs    an `OutputSample` of every batch -> (sum, how many values it is of)
    inputs     an `InputSample` of every batch -> (sum, how many values it is of)
    gradient   a `GradientSample` of every batch -> (sum, how many values it is of)
    per_image  a `GradientSample` of every image by itself -> (sum, how many values it is of)
    hessian    the same of every batch, with H g for its gradient: g of all images, the Hessian H of the batch
    flow       (model, example inputs, parameter names) -> the finished statistic by parameter name, without images
    training   (sum so far, weight, its gradient, learning rate) at every step of the stage; adds to the sum in place
    structure, request   nothing is measured: `LayerView.norm` and `LayerView.n_keep`

What comes from images is a sum, so that several processes can each take a share of them; `finish` makes of the sum over
all batches what criteria read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune_cli.criteria.flow import synaptic_flow
from prune_cli.errors import ConfigError, nearest

Source = Literal["outputs", "inputs", "gradient", "per_image", "hessian", "flow", "training", "structure", "request"]

RANK_ELEMENTS = 1 << 22  # entries of feature maps whose ranks are computed at a time


class RunningSum:
    """A running sum and how many values it is of. Adding two processes' totals gives the total of both."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count: Tensor | None = None

    def add(self, value: Tensor, count: float) -> None:
        """Adds a value that is itself a sum over `count` values."""
        if self.sum is None or self.count is None:
            self.sum = torch.zeros_like(value)
            self.count = torch.zeros((), dtype=wide(value.device), device=value.device)
        self.sum += value
        self.count += count

    def total(self) -> Tensor:
        """The sum; something must have been added."""
        assert self.sum is not None
        return self.sum

    def mean(self) -> Tensor:
        """The sum divided by the count."""
        assert self.count is not None
        return self.total() / self.count.to(self.total().dtype)


Finish = Callable[[RunningSum, Tensor, int], Tensor]
"""(sum over all batches, the layer's weight, axis of its output channels) -> the statistic."""


def mean(total: RunningSum, weight: Tensor, axis: int) -> Tensor:
    """What was summed, per value."""
    return total.mean()


def plain_sum(total: RunningSum, weight: Tensor, axis: int) -> Tensor:
    """What was summed, as it is."""
    return total.total()


def channel_mean(total: RunningSum, weight: Tensor, axis: int) -> Tensor:
    """The mean per output channel; groups of a transposed convolution share the positions of the weight's second axis."""
    return total.mean().view(-1, weight.shape[axis]).mean(0)


@dataclass(frozen=True)
class Need:
    """Something that a criterion reads besides weight, bias and generator.

    Attributes:
        name: key in `LayerView.statistics`, and in option files.
        source: where it comes from; see the top of this file, also for the arguments of `take`.
        shape: `channel` = (channels,), `weight` = broadcasts to the weight; None where it is no tensor.
        take: what is measured; None where nothing is.
        finish: for what comes from images: makes the statistic of the sum.
        of_norm: whether it is about the norm behind the layer, so that one must be there.
        temperature: what logits are divided by, for `hessian`.
        any_inputs: whether the loss alone touches the model's inputs, so that they may be anything, not just one tensor.
    """

    name: str
    source: Source
    shape: Literal["channel", "weight"] | None = None
    take: Callable[..., Any] | None = None
    finish: Finish = mean
    of_norm: bool = False
    any_inputs: bool = False
    temperature: float = 1.0

    @property
    def from_images(self) -> bool:
        """Whether calibration images must be there."""
        return self.source in ("outputs", "inputs", "gradient", "per_image", "hessian")

    @property
    def is_statistic(self) -> bool:
        """Whether it stands in `LayerView.statistics`; else it is an attribute of the view."""
        return self.source not in ("structure", "request")


# ---------------------------------------------------------------------------------------------- outputs of layers


@dataclass(frozen=True)
class OutputSample:
    """A layer's outputs for a batch, where the criterion's `at` says, and the axis of the channels."""

    values: Tensor
    axis: int


def not_positive(outputs: OutputSample) -> tuple[Tensor, int]:
    """How many of each channel's outputs a ReLU makes 0, and of how many: zeros, where a ReLU has come already."""
    return _per_channel((outputs.values <= 0).to(outputs.values.dtype), outputs.axis)


def positive_part(outputs: OutputSample) -> tuple[Tensor, int]:
    """The sum of each channel's outputs after a ReLU, and of how many."""
    return _per_channel(outputs.values.clamp_min(0), outputs.axis)


def ranks(outputs: OutputSample) -> tuple[Tensor, int]:
    """The sum of the matrix ranks of each channel's feature maps, and of how many maps.

    A map is (height, width) with numerical rank as in `torch.linalg.matrix_rank`; videos have one per frame, and where
    there is a line or a single number, its rank is 1 unless it is 0.
    """
    maps = outputs.values.movedim(outputs.axis, 1)
    batch, channels = maps.shape[:2]
    if maps.dim() < 4:
        return (maps.reshape(batch, channels, -1) != 0).any(2).sum(0).to(wide(maps.device)), batch
    maps = maps.reshape(batch, channels, -1, *maps.shape[-2:])
    flat = maps.flatten(0, 2)
    at_once = max(1, RANK_ELEMENTS // flat[0].numel())
    found = torch.cat([torch.linalg.matrix_rank(part) for part in flat.split(at_once)])
    per_map = found.view(batch, channels, -1)
    return per_map.sum((0, 2)).to(wide(maps.device)), batch * per_map.shape[2]


def _per_channel(values: Tensor, axis: int) -> tuple[Tensor, int]:
    others = [other for other in range(values.dim()) if other != axis]
    return values.sum(others, dtype=wide(values.device)), values.numel() // values.shape[axis]


# ------------------------------------------------------------------------------------------------ inputs of layers


@dataclass(frozen=True)
class InputSample:
    """A layer's inputs for a batch, and how its weight meets them.

    Attributes:
        values: as the operator is given them.
        outputs: its result.
        weight: the layer's parameter.
        geometry: (stride, padding, dilation, transposed) of a convolution; None where rows of inputs meet the weight.
    """

    values: Tensor
    outputs: Tensor
    weight: Tensor
    geometry: tuple[Any, Any, Any, bool] | None


def input_squares(inputs: InputSample) -> tuple[Tensor, int]:
    """Sum over images and positions of the squared inputs that each weight meets: (in_channels, *kernel)."""
    source = inputs.values
    if inputs.geometry is None:
        return source.flatten(0, -2).square().sum(0, dtype=wide(source.device)), 1
    stride, padding, dilation, transposed = inputs.geometry
    kernel = inputs.weight.shape[2:]
    squares = source.square()
    if not transposed:
        squares = nn.functional.pad(squares, [side for p in reversed(padding) for side in (p, p)])
    total = squares.new_zeros((source.shape[1], *kernel), dtype=wide(source.device))
    for place in itertools.product(*(range(size) for size in kernel)):
        window: tuple[slice, ...] = tuple(
            _met(at, s, p, d, source.shape[2 + axis], inputs.outputs.shape[2 + axis], transposed)
            for axis, (at, s, p, d) in enumerate(zip(place, stride, padding, dilation, strict=True))
        )
        part = squares[:, :, *window]
        corner: tuple[slice | int, ...] = (slice(None), *place)
        total[corner] = part.sum([0, *range(2, part.dim())], dtype=total.dtype)
    return total, 1


def _met(at: int, stride: int, padding: int, dilation: int, size: int, outputs: int, transposed: bool) -> slice:
    """Which inputs along one axis a kernel position multiplies: of the padded ones, or of a transposed layer's own."""
    start = at * dilation
    if not transposed:
        return slice(start, start + (outputs - 1) * stride + 1, stride)
    # Input i lands on output i * stride - padding + start, unless that is cut off.
    first = max(0, -((start - padding) // stride))
    last = min(size - 1, (outputs - 1 + padding - start) // stride)
    return slice(first, max(first, last + 1))


def input_norms(total: RunningSum, weight: Tensor, axis: int) -> Tensor:
    """L2 norms of the inputs, laid out as the weight is: of a grouped convolution every group meets its own."""
    norms = total.total().sqrt()
    if axis == 1:
        return norms.unsqueeze(1)
    groups = max(1, norms.shape[0] // weight.shape[1])
    if groups == 1:
        return norms.unsqueeze(0)
    return norms.view(groups, *weight.shape[1:]).repeat_interleave(weight.shape[0] // groups, 0)


# ------------------------------------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class GradientSample:
    """One layer after one backward pass.

    Attributes:
        weight: the layer's weight.
        gradient: of the mean loss of the images there.
        gate: (channels,) g * scale + g * shift of the norm behind the layer; 0 without one, or where no need is of it.
        axis: of the output channels in the weight.
        images: how many the loss is the mean over.
    """

    weight: Tensor
    gradient: Tensor
    gate: Tensor
    axis: int
    images: int


def _gradient(sample: GradientSample) -> tuple[Tensor, int]:
    return sample.gradient * sample.images, sample.images


def _squared_gradient(sample: GradientSample) -> tuple[Tensor, int]:
    return sample.gradient.square(), 1


def _taylor(sample: GradientSample) -> tuple[Tensor, int]:
    return (sample.gradient * sample.weight).square(), 1


def _taylor_filter(sample: GradientSample) -> tuple[Tensor, int]:
    products = (sample.gradient * sample.weight).movedim(sample.axis, 0).flatten(1)
    return products.sum(1, dtype=wide(products.device)).square(), 1


def _taylor_gate(sample: GradientSample) -> tuple[Tensor, int]:
    return sample.gate.to(wide(sample.gate.device)).square(), 1


# -------------------------------------------------------------------------------------------------------- training


def _movement(total: Tensor, weight: Tensor, gradient: Tensor, rate: float) -> None:
    total.addcmul_(gradient, weight, value=-rate)


# -------------------------------------------------------------------------------------------------------- the table

# fmt: off
NEEDS: Mapping[str, Need] = {need.name: need for need in (
    # share of a channel's outputs that a ReLU makes 0
    Need("not_positive", "outputs", "channel", not_positive, channel_mean),
    # mean of a channel's outputs after a ReLU
    Need("mean", "outputs", "channel", positive_part, channel_mean),
    # mean matrix rank of a channel's feature map
    Need("rank", "outputs", "channel", ranks, channel_mean),
    # L2 norm of the inputs that a weight meets, over all images
    Need("input_norm", "inputs", "weight", input_squares, input_norms),
    # gradient g of the mean loss over all images
    Need("gradient", "gradient", "weight", _gradient),
    # sum over batches of (g * w) ** 2
    Need("taylor", "gradient", "weight", _taylor, plain_sum, any_inputs=True),
    # sum over batches of (sum over the filter of g * w) ** 2
    Need("taylor_filter", "gradient", "channel", _taylor_filter, plain_sum, any_inputs=True),
    # sum over batches of (g_scale * scale + g_shift * shift) ** 2 of the norm behind the layer, 0 without one
    Need("taylor_gate", "gradient", "channel", _taylor_gate, plain_sum, of_norm=True),
    # mean over images, one at a time, of g ** 2
    Need("fisher", "per_image", "weight", _squared_gradient),
    # H g of the mean loss over all images, by logits / 200, which are far from decided in every network
    Need("hessian_gradient", "hessian", "weight", _gradient, temperature=200.0),
    # share of the network's synaptic flow that passes the weight
    Need("synaptic_flow", "flow", "weight", synaptic_flow),
    # sum over the steps of the stage's training of -lr * g * w
    Need("movement", "training", "weight", _movement),
    # the norm behind the layer
    Need("norm", "structure", of_norm=True),
    # output channels that will be kept
    Need("n_keep", "request", any_inputs=True),
)}
# fmt: on


def find(need: Need | str) -> Need:
    """The entry that a name stands for; an entry is returned as it is.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(need, Need):
        return need
    if need not in NEEDS:
        raise ConfigError(f"criterion.needs: there is no {need!r}{nearest(need, NEEDS)}")
    return NEEDS[need]


def wide(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
