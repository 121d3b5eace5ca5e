"""The bridge between a `State` and `fit`: batches, selection split, progress on screen, resumable checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.data.dataset import Loss
from prune_cli.distillation.objective import Objective
from prune_cli.errors import Interrupted
from prune_cli.masks import Masks
from prune_cli.measure.accuracy import accuracy
from prune_cli.pipeline.state import Outcome, State
from prune_cli.session import remembering
from prune_cli.session.remembering import Recorder
from prune_cli.training import fit as loop
from prune_cli.training.fit import OptimizerFactory, Progress
from prune_cli.training.training import Training

log = logging.getLogger(__name__)

EVALUATION_BATCH = 500

Save = Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]


def learn(
    state: State,
    loss: Loss,
    *,
    epochs: int,
    until: int | None = None,
    beyond: int = 0,
    training: Training,
    masks: Masks | None = None,
    regularise: loop.Regularise | None = None,
    progress: Progress | None = None,
    save: Save | None = None,
    stepped: Callable[[Progress], None] | None = None,
    seed: int | None = None,
) -> Progress:
    """Trains `state.model` in place on the training split, to `until` or to the end.

    Args:
        until, beyond: epoch, and batches of it, to train to; see `fit`.
        save: receives tensors and numbers of a resumable checkpoint; the stage's slot by default.
        stepped: called after every batch.
        seed: of the batches' order and augmentation; the stage's own by default.

    Raises:
        Interrupted: the user asked to stop; a resumable checkpoint is in the slot.
        TrainingError: the loss is not finite.
    """
    batches = state.data.train(training.batch_size, state.stage_seed if seed is None else seed, shard=state.world.shard)
    batches = loss.batches(batches) if isinstance(loss, Objective) else batches
    split = training.fit.select_on if training.fit.select_on != "last" else "val"
    write = save or state.keep

    def evaluate(model: nn.Module) -> float:
        return _accuracy(state, model, split)

    def checkpoint(progress: Progress) -> None:
        write(progress.tensors(state.model), progress.numbers())

    def tick(progress: Progress, count: int, rate: float) -> None:
        if stepped:
            stepped(progress)
        mean = progress.loss_sum / max(progress.seen, 1)
        state.console.tick(progress.epoch, progress.step, count, rate, mean)

    def epoch_done(progress: Progress) -> None:
        if state.world.main:
            state.console.history(state.stage, progress.history)

    with state.console.training(state.stage, progress.epoch if progress else 0, epochs, len(batches)):
        progress = loop.fit(
            state.model,
            batches,
            loss,
            optimizer=training.optimizer,
            lr_schedule=training.lr_schedule,
            epochs=epochs,
            until=until,
            beyond=beyond,
            masks=masks,
            options=training.fit,
            regularise=regularise,
            evaluate=evaluate if split == "test" or state.data.has_val else None,
            progress=progress,
            save=checkpoint,
            stop=state.interrupted,
            tick=tick,
            epoch_done=epoch_done,
            world=state.world,
        )
    _same_buffers(state, state.model)
    end = (epochs, 0) if until is None else (until, beyond)
    if not progress.done and (progress.epoch, progress.step) < end:
        raise Interrupted(
            f"stopped in {state.stage}, epoch {progress.epoch + 1}, step {progress.step}; the same command goes on there"
        )
    return progress


def trained(
    state: State,
    loss: Loss,
    *,
    epochs: int,
    training: Training,
    regularise: loop.Regularise | None = None,
    remember: Sequence[str] = (),
) -> State:
    """The state after a whole training under the state's masks, gone on from where an earlier run of it stopped.

    Args:
        remember: moments of which the stage keeps a snapshot; see `remembering.moment`.
    """
    batches = len(state.data.train(training.batch_size, 0, shard=state.world.shard))
    recorder = Recorder(remember, state.model, batches, training.fit.accumulate)
    begun = resumed(state, training.optimizer, recorder)
    recorder(begun)

    def save(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        state.keep({**tensors, **recorder.tensors()}, numbers)

    progress = learn(
        state,
        loss,
        epochs=epochs,
        training=training,
        masks=state.masks,
        regularise=regularise,
        progress=begun,
        save=save,
        stepped=recorder,
    )
    if missing := [tag for tag in remember if tag not in recorder.taken]:
        log.warning("%s: the training ended before %s was to be remembered", state.stage, ", ".join(missing))
    outcome = Outcome(
        epochs=progress.epoch,
        select_on=training.fit.select_on,
        history=tuple(progress.history),
        files=recorder.files(),
    )
    return state.evolve(outcome=outcome)


def _accuracy(state: State, model: nn.Module, split: str) -> float:
    """Percent right on a split, each rank counting its share with rank 0's norm statistics."""
    world = state.world
    if world.size == 1 or state.data.sizes[split] < world.size * EVALUATION_BATCH:
        return accuracy(model, state.data.evaluation(split, EVALUATION_BATCH)).acc1
    _same_buffers(state, model)
    found = accuracy(model, state.data.evaluation(split, EVALUATION_BATCH, shard=world.shard))
    correct, total = world.total(torch.tensor([found.correct, found.total])).tolist()
    return 100 * correct / total


def _same_buffers(state: State, model: nn.Module) -> None:
    """Rank 0's norm statistics on every rank, where each has those of its own shards: what is measured must agree."""
    if state.world.size > 1:
        shared = state.world.broadcast_tensors(dict(model.named_buffers()) if state.world.main else None)
        for name, buffer in shared.items():
            model.get_buffer(name).copy_(buffer)


def resumed(state: State, optimizer: OptimizerFactory, recorder: Recorder | None = None) -> Progress | None:
    """The progress of an earlier, unfinished run of this stage, with its weights loaded; None for a fresh start.

    Args:
        recorder: gets the snapshots back that the checkpoint holds.
    """
    found = state.unfinished()
    if not found:
        return None
    tensors, numbers = found
    if recorder:
        recorder.restore(tensors)
    own = {name: value for name, value in tensors.items() if not name.startswith(remembering.PREFIX)}
    progress = loop.restore_progress(state.model, optimizer, own, numbers)
    log.info("%s: going on from epoch %d, step %d", state.stage, progress.epoch + 1, progress.step)
    return progress


def cross_entropy(label_smoothing: float) -> Loss:
    """The plain loss of training, without a teacher."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

    return loss
