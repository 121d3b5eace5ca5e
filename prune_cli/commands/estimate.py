"""What a recipe would cost: time, disk and memory, from a few timed images per stage."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from prune_cli.data.splits import steps as batches_of
from prune_cli.measure.cost import cost
from prune_cli.measure.latency import synchronise
from prune_cli.pipeline.state import State
from prune_cli.pipeline.step import Pipeline, Step
from prune_cli.progress import clock
from prune_cli.training.training import Training

ENOUGH = 0.3  # seconds of a step from which it is timed as it is
FIRST = 4  # images of the first step that is timed
EVALUATED = 3  # a forward pass takes about a third of a training step
COPIES = 4  # of the weights while training: themselves, gradients, and moments or a checkpoint in the making


@dataclass(frozen=True)
class Timed:
    """One training step: seconds of the whole batch, bytes of what the backward pass needs; images that were tried."""

    seconds: float
    saved_bytes: float
    tried: int


def estimate(built: Pipeline, sizes: Mapping[str, int], config: Mapping[str, Any]) -> list[str]:
    """A line per stage, and what all take together.

    Args:
        sizes: images per split.
    """
    state = built.state
    size = cost(state.model, state.example_inputs(), {}).bytes
    lines, total, images, memory = [], 0.0, 0, 0.0
    decided = [s.name for s in built.steps if s.training is not None and (s.tries or s.epochs is None)]
    for number, step in enumerate(built.steps, 1):
        head = f"stage {number}  {step.name}: "
        if step.stage.becomes is not None:
            state = step.stage.becomes(state.evolve(stage=step.name), step.parameters)
            state = state.evolve(model=state.architecture.build().to(state.device))
        if step.training is None or not step.epochs:
            lines.append(head + ("trains as long as its schedule decides" if step.name in decided else "no training"))
            continue
        timed = timed_step(step.training, state)
        steps = batches_of(sizes["train"], step.training.batch_size, config.get("limit_batches"))
        seconds = step.epochs * (steps * timed.seconds + _evaluation(step, timed, sizes, config))
        seen = step.epochs * min(sizes["train"], steps * step.training.batch_size)
        total, images, memory = total + seconds, images + seen, max(memory, timed.saved_bytes + COPIES * size)
        candidates = ", besides the candidates of its schedule" if step.tries else ""
        lines.append(
            f"{head}{step.epochs} epochs of {steps} steps of {step.training.batch_size}: "
            f"{step.epochs * steps:,} steps, {seen:,} images, {clock(seconds)}{candidates}"
        )
    disk = size * (len(built.steps) + COPIES)
    where = f"{state.device}" + (f", {torch.get_num_threads()} threads" if state.device.type == "cpu" else "")
    besides = f"what the schedule of {' and '.join(decided)} decides" if decided else ""
    if images:
        spent = f"about {clock(total)} for {images:,} images on {where}" + (f", and {besides}" if besides else "")
    else:
        spent = besides or "nothing is trained"
    return [
        *lines,
        f"time     {spent}",
        f"disk     about {disk / 1e6:,.1f} MB: a checkpoint per stage, and one in the making",
        f"memory   about {memory / 1e6:,.0f} MB for weights, gradients and one batch, besides the images"
        if memory
        else f"memory   about {2 * size / 1e6:,.0f} MB for weights, besides the images",
    ]


def _evaluation(step: Step, timed: Timed, sizes: Mapping[str, int], config: Mapping[str, Any]) -> float:
    """Seconds per epoch of the evaluations on the held-out split."""
    assert step.training is not None
    if not step.training.fit.eval_every or config.get("limit_batches"):
        return 0.0
    per_image = timed.seconds / step.training.batch_size / EVALUATED
    return per_image * sizes.get("val", 0) / step.training.fit.eval_every


def timed_step(training: Training, state: State) -> Timed:
    """One forward and backward pass, on a copy of the network; of a few images where that is long enough to tell."""
    model = copy.deepcopy(state.model).train()
    images, labels = next(iter(state.data.train(training.batch_size, 0).epoch(0)))
    count = min(FIRST, len(images))
    _pass(model, images[:count], labels[:count], state)  # warms up
    while True:
        seconds, saved = _pass(model, images[:count], labels[:count], state)
        if seconds >= ENOUGH or count == len(images):
            share = training.batch_size / count
            return Timed(seconds * share, saved * share, count)
        count = min(2 * count, len(images))


def _pass(model: torch.nn.Module, images: Tensor, labels: Tensor, state: State) -> tuple[float, float]:
    """Seconds, and the bytes that were kept for the backward pass besides the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    began = time.perf_counter()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model(images), labels).backward()
    synchronise(state.device)
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds, float(sum(saved.values()))
