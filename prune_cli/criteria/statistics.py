"""The one pass over calibration images that all data-driven criteria share.

Only running sums are kept: per channel in float64, per weight in the weight's own precision (at least float32), both on
the weight's device. No activation outlives the operator that made it. Everything summed is additive over images, so
several processes can each take a share of the batches and add their sums up; means are taken at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prune_cli.criteria import needs as table
from prune_cli.criteria import sites as finding
from prune_cli.criteria.criterion import At, Norms
from prune_cli.criteria.needs import GradientSample, InputSample, Need, OutputSample, RunningSum
from prune_cli.criteria.sites import LAYERS, Sites, TrackedOutput
from prune_cli.data.dataset import Loss
from prune_cli.errors import ConfigError, first_line
from prune_cli.progress import track
from prune_cli.structure import prunable
from prune_cli.structure.modes import composed_attention, evaluating, norms_by_batch

Statistics = dict[str, dict[str, Tensor]]
"""Parameter name -> need -> what was measured."""

Sums = dict[tuple[str, Need], RunningSum]
"""(parameter name, need) -> its sum over all batches, not yet divided by anything."""


@dataclass(frozen=True)
class Calibration:
    """Which training images criteria see: fixed ones, classes as equal as possible, not augmented.

    Attributes:
        images: how many; all there are if there are fewer.
        batch_size: images per forward or backward pass.
    """

    images: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 64


def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    needs: Sequence[Need | str],
    loss: Loss,
    example_inputs: Tensor,
    *,
    at: At = "post_act",
    norms: Norms = "running",
    names: Sequence[str] | None = None,
    reduce: Callable[[Tensor], object] | None = None,
) -> Statistics:
    """Measures what `needs` name; see criterion.py for the list.

    The network runs in eval mode, so that norms use their running statistics: with those of the batch (`norms`), scaling a
    filter in front of a norm would change nothing and (sum of g * w) would be 0 for every one. Parameters, their
    gradients, buffers and modes are as before afterwards.

    Args:
        batches: (images, labels), gone through as often as needed; not touched when nothing needs images.
        loss: whose gradients are taken; a mean over the batch.
        example_inputs: one image, for finding where outputs are measured.
        at: where outputs are measured.
        norms: what batch norms divide by.
        names: weights of interest, by parameter name; all convolutions and linear layers by default.
        reduce: called on every sum and count, in the same order in every process, to add them up in place over
            processes that each saw a share of the images, at least one batch.

    Returns:
        Parameter name -> need -> tensor. Outputs of a layer that did not run are absent, and everything of a weight
        that is computed from other parameters; where the loss does not depend on a weight, its gradient is 0.

    Raises:
        ConfigError: the network's operators differ from batch to batch, or `norms` need more images in one.
    """
    names = list(names) if names is not None else list(prunable.targets(model))
    entries = [table.find(need) for need in needs]
    found: Statistics = {name: {} for name in names}
    names = [name for name in names if prunable.target(model, name).is_parameter]
    for need in entries:
        if need.source == "flow" and need.take:
            for name, value in need.take(model, example_inputs, names).items():
                found[name][need.name] = value
    measured = [need for need in entries if need.from_images]
    if not measured:
        return found
    sums = {(name, need): RunningSum() for name in names for need in measured}
    with evaluating(model), composed_attention():
        places = Sites()
        if any(need.source in ("outputs", "inputs") or need.of_norm for need in measured):
            places = finding.find(model, example_inputs)
        with _norms_by_batch(model) if norms == "batch" else nullcontext():
            _add_batches(model, batches, loss, places, at, sums)
            _add_curvature(model, batches, loss, sums, reduce)
    for (name, need), total in sums.items():
        if reduce is not None and total.sum is not None and total.count is not None:
            reduce(total.sum)
            reduce(total.count)
        if total.sum is not None:
            found[name][need.name] = _finished(model, name, need, total)
    return found


def _add_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    places: Sites,
    at: At,
    sums: Sums,
) -> None:
    """Adds what every batch says."""
    watched, sloped, single = (
        {place: total for place, total in sums.items() if place[1].source in sources}
        for sources in (("outputs", "inputs"), ("gradient",), ("per_image",))
    )
    if not (watched or sloped or single):
        return
    for images, labels in track(batches, "measuring for the criterion"):
        if watched:
            _watch(model, images, places, at, watched)
        if sloped:
            _slopes(model, (images, labels), loss, places, sloped)
        if single:
            for one in zip(images.split(1), labels.split(1), strict=True):
                _slopes(model, one, loss, places, single)


def _add_curvature(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    sums: Sums,
    reduce: Callable[[Tensor], object] | None,
) -> None:
    """Adds what needs of H g say of every batch: once through the images for g, and once more for its products with H."""
    for need in dict.fromkeys(need for _, need in sums if need.source == "hessian"):
        names = [name for name, other in sums if other == need]
        cooled = _cooled(loss, need.temperature)
        slope = {name: RunningSum() for name in names}
        for images, labels in track(batches, "measuring for the criterion"):
            for name, gradient in _gradients(model, cooled, images, labels, names).items():
                slope[name].add(gradient * len(images), len(images))
        for total in slope.values():
            if reduce is not None:
                assert total.sum is not None and total.count is not None
                reduce(total.sum)
                reduce(total.count)
        along = {name: total.mean() for name, total in slope.items()}
        for images, labels in track(batches, "measuring for the criterion"):
            for name, product in _hessian_products(model, cooled, images, labels, along).items():
                weight, axis = model.get_parameter(name).detach(), prunable.target(model, name).axis
                sample = GradientSample(weight, product, weight.new_zeros(weight.shape[axis]), axis, len(images))
                assert need.take is not None
                sums[name, need].add(*need.take(sample))


def _cooled(loss: Loss, temperature: float) -> Loss:
    """The loss of logits divided by a temperature."""

    def divide(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ConfigError(
                f"criterion: divides logits by {temperature:g}, but the network returns a {type(output).__name__}, not a "
                "tensor; choose another criterion"
            )
        return output / temperature

    def cooled(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        handle = model.register_forward_hook(divide)
        try:
            return loss(model, images, labels)
        finally:
            handle.remove()

    return cooled


def _watch(model: nn.Module, images: Tensor, places: Sites, at: At, sums: Sums) -> None:
    """One forward pass, measured operator by operator."""
    inward, outward = (
        {name: [need for other, need in sums if other == name and need.source == source] for name, _ in sums}
        for source in ("inputs", "outputs")
    )

    def layer(trail: TrackedOutput, name: str, args: tuple[Any, ...], result: Any) -> None:
        if not inward.get(trail.weight):
            return
        values, weight = args[LAYERS[name][0]].detach(), model.get_parameter(trail.weight)
        sample = InputSample(values, result, weight, args[3:7] if name == "convolution" else None)
        for need in inward[trail.weight]:
            assert need.take is not None
            sums[trail.weight, need].add(*need.take(sample))

    def outputs(trail: TrackedOutput) -> bool:
        for need in outward.get(trail.weight, ()):
            assert need.take is not None
            sums[trail.weight, need].add(*need.take(OutputSample(trail.values, trail.axis)))
        return False

    finding.measure(model, images, places, at, layer, outputs)


def _slopes(model: nn.Module, batch: tuple[Tensor, Tensor], loss: Loss, places: Sites, sums: Sums) -> None:
    """One backward pass."""
    images, labels = batch
    names = list(dict.fromkeys(name for name, _ in sums))
    of_norm = any(need.of_norm for _, need in sums)
    norms = {name: places.norm_of(name) or (None, None) for name in names} if of_norm else {}
    wanted = [*names, *(part for pair in norms.values() for part in pair if part is not None)]
    gradients = _gradients(model, loss, images, labels, list(dict.fromkeys(wanted)))
    samples = {}
    for name in names:
        axis = prunable.target(model, name).axis
        weight = model.get_parameter(name).detach()
        gate = weight.new_zeros(weight.shape[axis])
        for part in norms.get(name, ()):
            if part is not None:
                gate = gate + gradients[part] * model.get_parameter(part).detach()
        samples[name] = GradientSample(weight, gradients[name], gate, axis, len(images))
    for (name, need), total in sums.items():
        assert need.take is not None
        total.add(*need.take(samples[name]))


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


def _hessian_products(
    model: nn.Module, loss: Loss, images: Tensor, labels: Tensor, along: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The Hessian of the batch's mean loss times a direction, by differentiating (gradient . direction)."""
    parameters = [model.get_parameter(name) for name in along]
    # Fused attention has no second derivative.
    with _differentiable(parameters), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = loss(model, images, labels)
        slopes = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        pairs = [(slope, way) for slope, way in zip(slopes, along.values(), strict=True) if slope is not None]
        turning = torch.stack([(slope * way).sum() for slope, way in pairs]).sum() if pairs else value * 0
        found = torch.autograd.grad(turning, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(way) if product is None else product.to(way.dtype)
        for (name, way), product in zip(along.items(), found, strict=True)
    }


@contextmanager
def _norms_by_batch(model: nn.Module) -> Iterator[None]:
    """As `norms_by_batch`.

    Raises:
        ConfigError: a norm would see one value per channel.
    """
    try:
        with norms_by_batch(model):
            yield
    except ValueError as error:
        if "per channel" not in str(error):
            raise
        raise ConfigError(f"criterion: {first_line(error)}; choose another calibration.batch_size") from error


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


def _finished(model: nn.Module, name: str, need: Need, total: RunningSum) -> Tensor:
    """A sum turned into what the criteria read.

    Raises:
        ConfigError: an entry of the user's own gives another shape than it says.
    """
    weight, axis = model.get_parameter(name), prunable.target(model, name).axis
    value = need.finish(total, weight.detach(), axis)
    if need.shape == "channel":
        fits = value.shape == weight.shape[axis : axis + 1]
    else:
        fits = value.dim() <= weight.dim() and all(
            mine in (1, size) for mine, size in zip(reversed(value.shape), reversed(weight.shape), strict=False)
        )
    if not fits:
        raise ConfigError(
            f"criterion: the statistic {need.name!r} of {name} has shape {tuple(value.shape)}, which is no "
            f"{need.shape} shape of a weight {tuple(weight.shape)}"
        )
    return value
