"""Which image goes where and when: random generators, held-out splits, balanced choices, steps and shards.

Everything here is a pure function of its arguments and works on indices only.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import Annotated

import numpy as np
from pydantic import Field

from prune_cli.data.dataset import Shard
from prune_cli.errors import ConfigError


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that depends on all of `key` and on nothing else."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


Amount = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)]
"""How much is held out: a fraction in [0, 1), or a whole number of images."""


def held_out_count(amount: float, total: int, key: str) -> int:
    """How many of `total` images are held out: a fraction in [0, 1), or from 1 on a whole number of images.

    A number written with a point is a fraction: 1.0 would be all images, and is refused.

    Raises:
        ConfigError: naming `key`, if `amount` is neither, or would leave nothing to train on.
    """
    if not amount >= 0 or (amount >= 1 and (isinstance(amount, float) or amount != int(amount))):
        raise ConfigError(f"{key}={amount}: give a fraction in [0, 1) or a whole number of images")
    count = int(amount) if amount >= 1 else int(Fraction(str(amount)) * total)
    if count >= total:
        raise ConfigError(f"{key}={amount} leaves no image to train on: there are {total}")
    return count


def shares(sizes: np.ndarray, count: int) -> np.ndarray:
    """Splits `count` over classes in proportion to `sizes`, by largest remainder (ties: first class).

    A class keeps at least one image of its own as long as other classes can give instead.
    """
    quota = sizes * count // sizes.sum()
    remainder = sizes * count - quota * sizes.sum()
    by_remainder = np.argsort(-remainder, kind="stable")
    for spare in (1, 0):
        while quota.sum() < count:
            free = [c for c in by_remainder if quota[c] + spare < sizes[c]][: count - int(quota.sum())]
            if not free:
                break
            quota[free] += 1
    return quota


def hold_out(labels: np.ndarray, count: int, *key: int | str) -> tuple[np.ndarray, np.ndarray]:
    """Two ascending index arrays (kept, held out), the second of length `count` and stratified by class.

    Args:
        labels: int64 `(N,)`.
        count: how many to hold out, in [0, N).
        key: what the random choice depends on.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    rng = generator("hold_out", *key)
    held = np.zeros(len(labels), dtype=bool)
    for label, share in zip(classes, shares(sizes, count), strict=True):
        held[rng.permutation(np.flatnonzero(labels == label))[:share]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def balanced(labels: np.ndarray, count: int, *key: int | str) -> np.ndarray:
    """`count` distinct indices (or all there are), classes as equal as possible, in mixed order.

    Every class is shuffled; the choice goes round the classes, so each prefix is as balanced as the whole.
    """
    rng = generator("balanced", *key)
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        turn[members] = np.arange(len(members))
    # Ties within a round are broken at random: a cut inside a round must not favour the first classes.
    return np.lexsort((rng.permutation(len(labels)), turn))[:count]


def dealt(indices: np.ndarray, batch_size: int, limit: int | None, shard: Shard) -> np.ndarray:
    """A shard's indices where whole batches are dealt out in turn, of the first `limit` batches."""
    rank, world = shard
    batches = np.arange(len(indices)) // batch_size
    return indices[(batches % world == rank) & (batches < (len(indices) if limit is None else limit))]


def check_batch(batch_size: int, total: int, shard: Shard) -> None:
    """Refuses batch sizes and shards for which some batch of some process would be empty.

    Raises:
        ConfigError: in one line.
    """
    rank, world = shard
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be at least 1")
    if not 0 <= rank < world:
        raise ConfigError(f"shard {rank} of {world}: the rank must be in [0, {world})")
    smallest = min(batch_size, total % batch_size or batch_size)
    if smallest < world:
        raise ConfigError(
            f"batch_size={batch_size} leaves a batch of {smallest} of {total} images for {world} processes: "
            "choose another batch size"
        )


TRIAL_VALUES = 700_000  # of the images of one evaluation, where a recipe is only tried: four of 3 x 224 x 224


def evaluated_at_once(batch_size: int, shape: tuple[int, int, int], limit: int | None) -> int:
    """The batch size of an evaluation: `batch_size`, or a few images where `limit` is a single batch."""
    if limit != 1:
        return batch_size
    return max(1, min(batch_size, TRIAL_VALUES // (shape[0] * shape[1] * shape[2])))


def steps(total: int, batch_size: int, limit: int | None) -> int:
    """Batches that `total` images make, the last one perhaps smaller, at most `limit`."""
    return min(-(-total // batch_size), total if limit is None else limit)


def shard_bounds(step: int, batch_size: int, total: int, shard: Shard) -> tuple[int, int]:
    """Where the shard's part of batch `step` begins and ends; parts differ by at most one image."""
    rank, world = shard
    start = step * batch_size
    size = min(batch_size, total - start)
    return start + size * rank // world, start + size * (rank + 1) // world
