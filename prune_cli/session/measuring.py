"""What criteria measure in a stage: on calibration images, or on those that training comes to next."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Calibration, Statistics, collect
from prune_cli.data.dataset import Batch
from prune_cli.pipeline.state import State
from prune_cli.selection import requirements
from prune_cli.session import learning
from prune_cli.training.training import Training


def statistics_of(state: State, criterion: Criterion, names: Sequence[str], calibration: Calibration) -> Statistics:
    """What the criterion needs, measured on the network as it is now, with its loss on the labels alone.

    Args:
        names: weights of interest.
        calibration: images for criteria that need them.
    """
    images = requirements.needs_images(criterion)
    batches = state.data.calibration(calibration.images, calibration.batch_size) if images else ()
    shared = state.world.size > 1 and len(batches) >= state.world.size  # else every rank sees all of them
    if shared:
        batches = state.data.calibration(calibration.images, calibration.batch_size, shard=state.world.shard)
    return _collected(state, criterion, names, batches, shared=shared)


def upcoming(
    state: State, criterion: Criterion, names: Sequence[str], training: Training, seed: int, epoch: int, step: int
) -> Statistics:
    """The same on the images of a training's next optimizer step, augmented as they will be.

    Args:
        names: weights of interest.
        seed: of the training's batches.
        epoch, step: where it stands.
    """
    world = state.world
    batches = state.data.train(training.batch_size, seed, shard=world.shard)
    if step >= len(batches):
        epoch, step = epoch + 1, 0
    images = list(itertools.islice(batches.epoch(epoch, step), training.fit.accumulate))
    return _collected(state, criterion, names, images, shared=world.size > 1)


def _collected(
    state: State, criterion: Criterion, names: Sequence[str], batches: Iterable[Batch], *, shared: bool
) -> Statistics:
    return collect(
        state.model,
        batches,
        criterion.needs,
        learning.cross_entropy(0.0),
        state.example_inputs(),
        at=criterion.at,
        norms=criterion.norms,
        names=list(names),
        reduce=state.world.add_up if shared else None,
    )
