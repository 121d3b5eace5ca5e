"""Where in an execution a layer's inputs and outputs can be measured, and which norm and activation follow it.

The network is executed once and its operators are written down; tensors are recognised by identity, so it makes no
difference whether a network calls modules or functions. The rule: a layer's output is followed from one operator to the
first one that reads its result, as long as that is

- a change of layout that keeps the channels apart (permute, or a view that leaves the last axis of a linear layer alone),
- a norm with one scale per channel, or
- elementwise with a result of the same shape: activations, additions of a bias, of a shortcut, products with a scalar;
- pooling too, as long as no elementwise operator has come, because max pooling is often put before its ReLU.

`post_act` is the result of the last norm or elementwise operator reached, `pre_norm` the output of the layer itself. The
norm of a layer is a norm that reads its output directly.

Later executions follow every output again, for as many steps as the first one found: how many copies and views lie in
between, which changes with the memory layout and so with the number of images, does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune_cli.criteria.criterion import At, Norm
from prune_cli.errors import ConfigError
from prune_cli.structure import prunable
from prune_cli.structure.modes import composed_attention, evaluating

# Position of the input and of the weight among the arguments of an operator that multiplies with a weight.
LAYERS = {"convolution": (0, 1), "linear": (0, 1), "mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
# Position of scale and shift among the arguments of a norm.
NORM_ARGUMENTS = {
    "native_batch_norm": (1, 2), "_native_batch_norm_legit": (1, 2), "_native_batch_norm_legit_no_training": (1, 2),
    "_batch_norm_with_update": (1, 2), "_batch_norm_no_update": (1, 2), "cudnn_batch_norm": (1, 2),
    "miopen_batch_norm": (1, 2), "native_layer_norm": (2, 3), "native_group_norm": (1, 2), "_fused_rms_norm": (2, 2),
}  # fmt: skip
LAYOUT = {"view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze"}
SAME = {"clone", "contiguous", "detach", "alias", "_to_copy"}
POOLING = {
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "max_pool2d", "max_pool1d",
    "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d",
}  # fmt: skip
ELEMENTWISE = {"hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "_prelu_kernel", "log_sigmoid_forward"}


NormNames = tuple[str | None, str | None]
"""Parameter names of a norm's scale and shift; None where absent."""


@dataclass(frozen=True)
class Site:
    """One execution of a layer.

    Attributes:
        weight: parameter name.
        steps: from the layer's own output to the place behind norm and activation.
        norm: the norm that reads the output, None without one.
    """

    weight: str
    steps: int
    norm: NormNames | None

    def wanted(self, at: At) -> int:
        """How many steps behind the layer its outputs are measured."""
        return self.steps if at == "post_act" else 0


@dataclass(frozen=True)
class Sites:
    """All executions of layers in one forward pass, in order."""

    sites: tuple[Site, ...] = ()

    def norm_of(self, weight: str) -> NormNames | None:
        """The norm behind a layer; None without one, or if several executions have different ones."""
        found = {site.norm for site in self.sites if site.weight == weight}
        return found.pop() if len(found) == 1 else None


@dataclass
class TrackedOutput:
    """An output of a layer on its way through the network.

    Attributes:
        weight: parameter name of the layer's weight.
        number: of the layer's execution among all.
        values: the tensor that stands for the output now, and `axis` the one of its channels.
        steps: operators passed, layout and the layer's own bias not counted.
        settled: steps at the last norm or elementwise operator.
        bias: the layer's bias where it comes in an operator of its own and is still to be added.
    """

    weight: str
    number: int
    values: Tensor
    axis: int
    bias: Tensor | None = None
    steps: int = 0
    settled: int = 0
    elementwise: bool = False
    norm: NormNames | None = None


Layer = Callable[[TrackedOutput, str, tuple[Any, ...], Any], None]
"""Told of every layer that ran: its output's trail, the operator, its arguments and its result."""

Reached = Callable[[TrackedOutput], bool]
"""Told of every place that an output reaches; whether to follow it further."""


class OutputTracker(TorchDispatchMode):
    """Follows the outputs of a network's layers while it runs, keeping no more than one tensor per output."""

    def __init__(self, model: nn.Module, reached: Reached, layer: Layer | None = None) -> None:
        super().__init__()
        targets = prunable.targets(model)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.biases = {name: target.bias for name, target in targets.items()}
        self.weights: dict[int, tuple[str, Tensor]] = {  # weights and views of them, kept so that ids stay theirs
            id(weight): (name, weight)
            for name, target in targets.items()
            if (weight := target.module._parameters.get("weight")) is not None  # not computed from others
        }
        self.trails: dict[int, list[TrackedOutput]] = {}
        self.reached, self.layer = reached, layer
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        if not outputs:
            return result
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves(args) if torch.is_tensor(leaf)]
        pointwise = (torch.Tag.pointwise in func.tags or name in ELEMENTWISE) and name not in SAME
        call = _Call(name, args, inputs, outputs[0], pointwise)
        for key in dict.fromkeys(id(leaf) for leaf in inputs):
            for trail in self.trails.pop(key, ()):
                if self._advance(trail, call):
                    self._follow(trail)
        if name in LAYERS:
            self._start(call)
        elif name in LAYOUT | SAME and inputs and id(inputs[0]) in self.weights:
            for leaf in outputs:
                self.weights.setdefault(id(leaf), (self.weights[id(inputs[0])][0], leaf))
        return result

    def finish(self) -> None:
        """Ends outputs that nothing read: those of the network."""
        for trail in [trail for trails in self.trails.values() for trail in trails]:
            if trail.bias is not None:
                self.reached(trail)
        self.trails.clear()

    def _follow(self, trail: TrackedOutput) -> None:
        self.trails.setdefault(id(trail.values), []).append(trail)

    def _start(self, call: _Call) -> None:
        known = self.weights.get(id(call.args[LAYERS[call.name][1]]))
        if known is None:
            return
        name = known[0]
        axis = 1 if call.name == "convolution" else call.output.dim() - 1
        bias = self.biases[name]
        trail = TrackedOutput(
            name, self.count, call.output, axis, None if any(leaf is bias for leaf in call.inputs) else bias
        )
        self.count += 1
        if self.layer is not None:
            self.layer(trail, call.name, call.args, call.output)
        if trail.bias is not None or self.reached(trail):
            self._follow(trail)

    def _advance(self, trail: TrackedOutput, call: _Call) -> bool:
        """Moves a trail over an operator that reads it; whether to go on."""
        tensor = trail.values
        if (moved := _moved(call, trail)) is not None:
            trail.values, trail.axis = call.output, moved
            return True
        same = call.output.shape == tensor.shape
        if trail.bias is not None:
            added = same and call.name in ("add", "add_") and any(leaf is trail.bias for leaf in call.inputs)
            if added:
                trail.values = call.output
            trail.bias = None
            go_on = self.reached(trail)
            if added or not go_on:
                return go_on
        if call.name in NORM_ARGUMENTS and same and call.inputs[0] is tensor:
            pair = self._norm(call, tensor.shape[trail.axis])
            if pair is None:
                return False
            trail.norm = pair if trail.steps == 0 else trail.norm
        elif call.pointwise and same:
            trail.elementwise = True
        elif call.name not in POOLING or trail.elementwise:
            return False
        trail.values, trail.steps = call.output, trail.steps + 1
        if call.name not in POOLING:
            trail.settled = trail.steps
        return self.reached(trail)

    def _norm(self, call: _Call, channels: int) -> NormNames | None:
        """Parameter names of scale and shift; None if they are not one number per channel."""
        found: list[str | None] = []
        for position in NORM_ARGUMENTS[call.name]:
            value = call.args[position] if position < len(call.args) else None
            if value is not None and value.numel() != channels:
                return None
            found.append(None if value is None else self.names.get(id(value)))
        return (found[0], None) if call.name == "_fused_rms_norm" else (found[0], found[1])


@dataclass(frozen=True)
class _Call:
    name: str
    args: tuple[Any, ...]
    inputs: list[Tensor]
    output: Tensor
    pointwise: bool


def find(model: nn.Module, example_inputs: Tensor) -> Sites:
    """Executes the network on two examples and finds where its convolutions and linear layers can be measured.

    Args:
        model: put into eval mode by the caller; nothing is changed.
        example_inputs: (n, ...) images; only the shapes count.
    """
    trails: list[TrackedOutput] = []
    follow = OutputTracker(model, lambda trail: True, lambda trail, *call: trails.append(trail))
    with torch.no_grad(), composed_attention(), follow:
        model(example_inputs[:1])
    return Sites(tuple(Site(trail.weight, trail.settled, trail.norm) for trail in trails))


def measure(model: nn.Module, images: Tensor, sites: Sites, at: At, layer: Layer, outputs: Reached) -> None:
    """Executes the network and hands out every layer's arguments and its outputs as they are at `at`.

    Raises:
        ConfigError: the network runs other layers than on the example.
    """
    left = {number: site.weight for number, site in enumerate(sites.sites)}

    def reached(trail: TrackedOutput) -> bool:
        if left.get(trail.number) != trail.weight or trail.steps < sites.sites[trail.number].wanted(at):
            return True
        del left[trail.number]
        outputs(trail)
        return False

    follow = OutputTracker(model, reached, layer)
    with torch.no_grad(), composed_attention(), follow:
        model(images)
    follow.finish()
    if left or follow.count != len(sites.sites):
        raise ConfigError(
            "criterion: the network runs other operators on calibration images than on an example, so its outputs "
            "cannot be told apart; choose a criterion that reads weights or gradients"
        )


def norms(model: nn.Module, example_inputs: Tensor) -> dict[str, Norm]:
    """The norm that follows each layer, by parameter name of the layer's weight; layers without one are absent."""
    with evaluating(model):
        found = find(model, example_inputs)
    parameters = dict(model.named_parameters())

    def values(name: str | None) -> Tensor | None:
        return None if name is None else parameters[name].detach()

    pairs = {site.weight: found.norm_of(site.weight) for site in found.sites}
    return {name: Norm(values(pair[0]), values(pair[1])) for name, pair in pairs.items() if pair is not None}


def _moved(call: _Call, trail: TrackedOutput) -> int | None:
    """The channel axis after a change of layout; None for anything else, or when channels get mixed."""
    tensor, axis, output = trail.values, trail.axis, call.output
    if not call.inputs or call.inputs[0] is not tensor:
        return None
    if call.name in SAME and output.shape == tensor.shape:
        return axis
    if call.name == "permute":
        return [entry % tensor.dim() for entry in call.args[1]].index(axis)
    if call.name in ("transpose", "t"):
        first, second = (0, 1) if call.name == "t" else (entry % tensor.dim() for entry in call.args[1:3])
        return {first: second, second: first}.get(axis, axis)
    if call.name in ("view", "_unsafe_view", "reshape"):
        if output.shape == tensor.shape:
            return axis
        if axis == tensor.dim() - 1 and output.shape[-1] == tensor.shape[-1]:
            return output.dim() - 1
    return None
