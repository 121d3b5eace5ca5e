"""The one training loop. The loss, the batches and the masks are passed in; nothing here knows of stages.

`fit` can stop after any step and go on from the returned `Progress` with the same bits: batches are pure functions
of (seed, epoch, step), learning rates of the time, and what has state is in the `Progress`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli.data.dataset import Batches, Loss
from prune_cli.errors import TrainingError
from prune_cli.masks import Enforcer, Masks
from prune_cli.training.distributed import ALONE, World, parallel
from prune_cli.training.precision import lowered

Epochs = Annotated[int, Field(ge=0)]
"""Passes over the training split."""

BatchSize = Annotated[int, Field(ge=1)]
"""Images per step, of all processes together."""

Smoothing = Annotated[float, Field(ge=0, lt=1)]
"""Share of the target spread over all classes."""

OptimizerFactory = Callable[..., torch.optim.Optimizer]
LrSchedule = Callable[[float, int], float]
Regularise = Callable[[int, dict[str, Tensor]], None]
"""(optimizer steps made so far, memory) -> None; adds to the gradients. What it decides on the way goes into the
memory, which belongs to the progress: it must depend on nothing else that changes."""


@dataclass(frozen=True)
class Options:
    """How to train; what is trained and for how long are arguments of `fit`.

    Attributes:
        precision: arithmetic of the forward pass; bf16 is autocast, weights stay float32. Where the device has no
            instructions for it (`precision.has_bf16`), bf16 is float32, and bf16! is bf16 nevertheless.
        channels_last: NHWC memory layout, faster for convolutions in bf16.
        compile: run the forward pass through torch.compile.
        accumulate: batches whose gradients are averaged into one optimizer step.
        clip: largest global gradient norm, or null.
        ema: decay of a moving average of the weights, which replaces the weights at the end, or null.
        early_stop: evaluations without improvement after which training ends, or null.
        select_on: split whose best epoch is kept; `last` keeps the last epoch.
        sync_norms: with several processes on GPUs, batch norms see the statistics of the whole batch.
        eval_every: epochs between evaluations on the held-out split; 0 = only where something depends on it.
        checkpoint_seconds: least time between resumable checkpoints inside a stage.
    """

    precision: Literal["float32", "bf16", "bf16!"] = "float32"
    channels_last: bool = False
    compile: bool = False
    accumulate: Annotated[int, Field(ge=1)] = 1
    clip: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    early_stop: Annotated[int, Field(ge=1)] | None = None
    select_on: Literal["last", "val", "test"] = "last"
    sync_norms: bool = False
    eval_every: Annotated[int, Field(ge=0)] = 1
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30.0


DEFAULTS = Options()


@dataclass
class Progress:
    """Everything with state in an unfinished training, besides the model's own weights.

    Attributes:
        loss: the loss, where it has parameters of its own.
        waiting: those parameters and their moments as a checkpoint has them, until `fit` is given the loss.
    """

    epoch: int = 0
    step: int = 0
    optimizer: torch.optim.Optimizer | None = None
    loss: nn.Module | None = None
    waiting: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] | None = None
    best_score: float = -math.inf
    best_epoch: int = -1
    stale: int = 0
    loss_sum: float = 0.0
    seen: int = 0
    done: bool = False
    history: list[dict[str, float]] = field(default_factory=list)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """All tensors of a checkpoint inside a stage: weights, moments, averages and the state of the generator."""
        named = {f"model/{name}": value for name, value in model.state_dict().items()}
        names: dict[Tensor, str] = {parameter: f"optimizer/{name}" for name, parameter in model.named_parameters()}
        if self.loss is not None:
            named |= {f"loss/{name}": value for name, value in self.loss.state_dict().items()}
            names |= {parameter: f"loss_optimizer/{name}" for name, parameter in self.loss.named_parameters()}
        named |= self.waiting
        for parameter, state in self.optimizer.state.items() if self.optimizer else ():
            for key, value in state.items():
                if torch.is_tensor(value):
                    named[f"{names[parameter]}/{key}"] = value
        for prefix, values in (("average", self.average), ("best", self.best), ("memory", self.memory)):
            named |= {f"{prefix}/{name}": value for name, value in (values or {}).items()}
        named["rng"] = torch.get_rng_state()
        return named

    def numbers(self) -> dict[str, Any]:
        """The rest of a checkpoint, JSON-serialisable."""
        keys = ["epoch", "step", "best_score", "best_epoch", "stale", "loss_sum", "seen", "done", "history"]
        return {key: getattr(self, key) for key in keys} | {"best_score": repr(self.best_score)}

    def train_along(self, loss: Loss) -> None:
        """Gives the optimizer the loss's own parameters, as a checkpoint left them; those of another loss leave it."""
        own = loss if isinstance(loss, nn.Module) and trainable(loss) else None
        optimizer = self.optimizer
        assert optimizer is not None
        if own is self.loss:
            return
        for parameter in trainable(self.loss) if self.loss is not None else ():
            optimizer.state.pop(parameter, None)
            for group in optimizer.param_groups:
                group["params"] = [other for other in group["params"] if other is not parameter]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.loss = own
        if own is None:
            return
        optimizer.add_param_group({"params": trainable(own)})
        if self.waiting:
            found = _grouped(self.waiting)
            own.load_state_dict(found["loss"])
            _load_moments(optimizer, own, found.get("loss_optimizer", {}))
            self.waiting = {}


def restore_progress(
    model: nn.Module, factory: OptimizerFactory, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> Progress:
    """The inverse of `Progress.tensors` and `Progress.numbers`; loads the weights into `model`."""
    groups = _grouped(tensors)
    model.load_state_dict(groups["model"])
    optimizer = factory(trainable(model))
    _load_moments(optimizer, model, groups.get("optimizer", {}))
    torch.set_rng_state(tensors["rng"].cpu())
    device = next(model.parameters()).device
    kept = {
        key: {name: value.to(device) for name, value in groups.get(key, {}).items()} or None
        for key in ("average", "best")
    }
    values = dict(numbers) | {"best_score": float(numbers["best_score"])}
    return Progress(
        optimizer=optimizer,
        waiting={name: value for name, value in tensors.items() if name.startswith(("loss/", "loss_optimizer/"))},
        average=kept["average"],
        best=kept["best"],
        memory=groups.get("memory", {}),
        **values,
    )


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a checkpoint by what stands before the first slash of their names."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    return groups


def _load_moments(optimizer: torch.optim.Optimizer, module: nn.Module, moments: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, value in moments.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        # Step counters stay on the CPU, as the optimizers themselves keep them.
        moved = value if value.dim() == 0 else torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = moved


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    *,
    optimizer: OptimizerFactory,
    lr_schedule: LrSchedule,
    epochs: int,
    until: int | None = None,
    beyond: int = 0,
    masks: Masks | None = None,
    options: Options = DEFAULTS,
    regularise: Regularise | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
    save: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    tick: Callable[[Progress, int, float], None] | None = None,
    epoch_done: Callable[[Progress], None] | None = None,
    world: World = ALONE,
) -> Progress:
    """Trains `model` in place.

    Args:
        loss: called once per batch inside the chosen precision. One that is a module has parameters of its own: they are
            trained along and kept in checkpoints, but neither averaged over time nor selected, since no result has them.
            One that is a context manager is entered while the network trains.
        optimizer: makes the optimizer from the trainable parameters.
        lr_schedule: (epochs done, epochs) -> factor on each parameter group's learning rate.
        epochs: length of the whole training, to which the learning rate refers.
        until: epoch before which to return, for trainings in several parts; the whole training by default.
        beyond: batches of that epoch to train on before returning, whole optimizer steps.
        masks: entries that must be zero after every step, in weights, moments and the moving average.
        regularise: called between backward and step, to add to gradients; see `Regularise`.
        evaluate: accuracy on the held-out split, for selection and early stopping; None where there is none.
        progress: where an earlier call stopped.
        save: called with the progress after epochs, and before returning on `stop`.
        stop: asked after every optimizer step; True ends the call, also in the middle of an epoch.
        tick: called after every step with the progress, the batch size and the learning rate.
        epoch_done: called after every epoch, when its row is in the progress's history.
        world: the processes that train together; `batches` yields this one's share of every batch.

    Returns:
        The progress; `done` tells a finished training from an interrupted one.

    Raises:
        TrainingError: the loss is not finite; names the epoch, step and learning rate.
    """
    end = (epochs, 0) if until is None else min((until, beyond), (epochs, 0))
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    progress = progress or Progress()
    progress.optimizer = progress.optimizer or optimizer(trainable(model))
    progress.train_along(loss)
    if options.ema and progress.average is None:
        progress.average = _floats(model)
    entered = loss if isinstance(loss, AbstractContextManager) else nullcontext()
    with entered, parallel(model, world, sync_norms=options.sync_norms) as forward:
        run = _Step(model, forward, batches, loss, progress, options, masks or {}, regularise, world)
        if not _epochs(run, lr_schedule, epochs, end, evaluate, save, stop, tick, epoch_done):
            return progress
    if progress.epoch >= epochs:
        progress.done = True
    if progress.done:
        _settle(model, progress)
    model.eval()
    return progress


def _epochs(
    run: _Step,
    lr_schedule: LrSchedule,
    epochs: int,
    end: tuple[int, int],
    evaluate: Callable[[nn.Module], float] | None,
    save: Callable[[Progress], None] | None,
    stop: Callable[[], bool],
    tick: Callable[[Progress, int, float], None] | None,
    epoch_done: Callable[[Progress], None] | None,
) -> bool:
    """The loop over epochs and steps, to an epoch and a batch of it; False where `stop` ended it, with progress saved."""
    progress, batches, world = run.progress, run.batches, run.world
    saved = time.monotonic()
    run.model.train()
    while (progress.epoch, progress.step) < end and not progress.done:
        losses = _Finite(progress, run.device)
        for images, labels in batches.epoch(progress.epoch, progress.step):
            rate = _set_rate(run.optimizer, lr_schedule(progress.epoch + progress.step / len(batches), epochs))
            last = progress.step + 1 == len(batches)
            stepped = run(images, labels, last)
            losses.add(run.value, len(labels), rate)
            progress.step += 1
            if tick:
                tick(progress, len(labels), rate)
            # Between two batches of one accumulated step there are gradients, which a checkpoint does not hold.
            if stepped and not last and world.any(stop()):
                losses.flush()
                if save:
                    save(progress)
                return False
            if stepped and not last and (progress.epoch, progress.step) >= end:
                losses.flush()
                return True
        losses.flush()
        _close_epoch(run, evaluate, epochs, rate)
        if epoch_done:
            epoch_done(progress)
        stopping = world.any(stop())
        due = time.monotonic() - saved >= run.options.checkpoint_seconds
        if save and (progress.epoch, 0) < end and (stopping or due):
            save(progress)
            saved = time.monotonic()
        if stopping and (progress.epoch, 0) < end:
            return False
    return True


class _Step:
    """One batch: forward, backward, and every `accumulate` batches an optimizer step with masks and average."""

    def __init__(
        self,
        model: nn.Module,
        forward: nn.Module,
        batches: Batches,
        loss: Loss,
        progress: Progress,
        options: Options,
        masks: Masks,
        regularise: Regularise | None,
        world: World,
    ) -> None:
        assert progress.optimizer is not None
        self.model, self.batches, self.loss, self.progress = model, batches, loss, progress
        self.options, self.world = options, world
        self.optimizer = progress.optimizer
        self.regularise, self.steps = regularise, math.ceil(len(batches) / options.accumulate)
        self.enforce = Enforcer(model, masks, self.optimizer)
        self.masks = masks
        self.forward: Any = torch.compile(forward) if options.compile else forward
        self.device = next(iter(model.parameters())).device
        self.own = trainable(progress.loss) if progress.loss is not None else []  # outside of what averages gradients
        self.parameters = trainable(model) + self.own
        self.lowered = lowered(options.precision, self.device)

    def __call__(self, images: Tensor, labels: Tensor, last: bool) -> bool:
        """Leaves the loss in `value`; returns whether the optimizer made a step."""
        if self.options.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16) if self.lowered else nullcontext():
            value = self.loss(self.forward, images, labels)
        weight = self._batch_weight(len(labels)) / self.options.accumulate
        (value if weight == 1 else value * weight).backward()
        self.value = value.detach()
        if not last and (self.progress.step + 1) % self.options.accumulate:
            return False
        for parameter in self.own if self.world.size > 1 else ():
            if parameter.grad is not None:
                self.world.add_up(parameter.grad)
                parameter.grad.div_(self.world.size)
        if self.regularise:
            done = self.progress.epoch * self.steps + self.progress.step // self.options.accumulate
            self.regularise(done, self.progress.memory)
        if self.options.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.enforce()
        if self.progress.average is not None:
            self._average()
        return True

    def _batch_weight(self, count: int) -> float:
        """What makes the mean of the ranks' gradients the mean over the whole batch, where shards differ in size."""
        if self.world.size == 1:
            return 1.0
        return count * self.world.size / self.batches.size(self.progress.step)

    @torch.no_grad()
    def _average(self) -> None:
        current = _floats(self.model, copy=False)
        kept = self.progress.average or {}
        weight = 1 - (self.options.ema or 0.0)
        torch._foreach_lerp_([kept[name] for name in current], list(current.values()), weight)
        for name, mask in self.masks.items():
            kept[name].mul_(mask.to(kept[name].device))


class _Finite:
    """Sums losses and stops at the first that is not finite; on a GPU it looks only now and then, to not wait."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.progress, self.patience = progress, 1 if device.type == "cpu" else 32
        self.pending: list[tuple[Tensor, int, float, int]] = []

    def add(self, value: Tensor, count: int, rate: float) -> None:
        self.pending.append((value, count, rate, self.progress.step))
        if len(self.pending) >= self.patience:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        values = torch.stack([value for value, *_ in self.pending]).tolist()
        for number, (_, count, rate, step) in zip(values, self.pending, strict=True):
            if not math.isfinite(number):
                raise TrainingError(
                    f"the loss is {number} in epoch {self.progress.epoch + 1}, step {step + 1}, at learning rate "
                    f"{rate:g}; a lower learning rate, a warm-up or gradient clipping usually helps"
                )
            self.progress.loss_sum += number * count
            self.progress.seen += count
        self.pending.clear()


def _set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def _floats(model: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    floats = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    return {name: value.detach().clone() for name, value in floats.items()} if copy else floats


def _close_epoch(run: _Step, evaluate: Callable[[nn.Module], float] | None, epochs: int, rate: float) -> None:
    model, progress, options = run.model, run.progress, run.options
    progress.loss_sum, progress.seen = run.world.total(
        torch.tensor([progress.loss_sum, progress.seen], dtype=torch.double)
    ).tolist()
    row = {"epoch": len(progress.history) + 1, "loss": progress.loss_sum / max(progress.seen, 1), "lr": rate}
    progress.epoch, progress.step, progress.loss_sum, progress.seen = progress.epoch + 1, 0, 0.0, 0
    selects = options.select_on != "last" or options.early_stop is not None
    due = options.eval_every and (progress.epoch % options.eval_every == 0 or progress.epoch == epochs)
    if evaluate and (selects or due):
        score = row["acc1"] = _with_average(model, progress, evaluate)
        if score > progress.best_score:
            progress.best_score, progress.best_epoch, progress.stale = score, progress.epoch, 0
            if options.select_on != "last":
                progress.best = {name: value.clone() for name, value in model.state_dict().items()}
                progress.best |= {name: value.clone() for name, value in (progress.average or {}).items()}
        else:
            progress.stale += 1
        if options.early_stop is not None and progress.stale >= options.early_stop:
            progress.done = True
    progress.history.append(row)


def _with_average(model: nn.Module, progress: Progress, evaluate: Callable[[nn.Module], float]) -> float:
    """Evaluates what would be kept: the moving average where there is one; the model is as before afterwards."""
    current = _floats(model) if progress.average else {}
    if progress.average:
        model.load_state_dict(progress.average, strict=False)
    score = evaluate(model)
    if current:
        model.load_state_dict(current, strict=False)
    model.train()
    return score


def _settle(model: nn.Module, progress: Progress) -> None:
    """Leaves in the model the weights that the options asked for: best epoch, else moving average, else last."""
    if progress.best is not None:
        model.load_state_dict(progress.best)
    elif progress.average is not None:
        model.load_state_dict(progress.average, strict=False)
