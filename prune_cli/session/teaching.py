"""From a distillation option to the loss of a stage, and what can be wrong with it before anything is trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from prune_cli.config.content import content_key
from prune_cli.data.dataset import Loss, Views
from prune_cli.distillation.distillation import Distillation, Term
from prune_cli.distillation.lessons import logits_of
from prune_cli.distillation.objective import Objective, Taught, prepared
from prune_cli.errors import ConfigError, PruneError
from prune_cli.pipeline.code import code_behind
from prune_cli.pipeline.loading import load_teacher
from prune_cli.pipeline.state import State, Teacher, derive_seed
from prune_cli.pipeline.store import Store, key_of
from prune_cli.pipeline.tables import table
from prune_cli.session import learning
from prune_cli.tensors import state_sha256
from prune_cli.training.precision import lowered
from prune_cli.training.training import Training

MOST_BYTES = 1 << 30
"""Of a teacher's table."""


def check(state: State, distillation: Distillation) -> None:
    """Refuses teachers that will not be there, cannot be read or have other classes, and features that are not there.

    The teacher `dense` does not exist yet: a network of its architecture stands for it.

    Raises:
        ConfigError: says which key to change.
        CheckpointError: see `load_teacher`.
    """
    for key, term in distillation.all_terms.items():
        _check_teacher(state, term, key)
        teacher = _stand_in(state) if term.teacher == "dense" else _checked(state, term, key).model
        _check_cache(state, term, key)
        _prepared(state, term, teacher, key)


def _check_teacher(state: State, term: Term, key: str) -> None:
    if term.teacher is None:
        raise ConfigError(f"{state.stage}: {key}.loss learns from a teacher: give {key}.teacher=dense or a PATH")
    if term.teacher == "dense":
        if state.dense is None:
            raise ConfigError(
                f"{state.stage}: {key}.teacher=dense is the network before the first pruning stage, but none comes "
                f"before; give {key}.teacher=PATH"
            )
    elif not term.teacher.exists():
        raise ConfigError(f"{state.stage}: {key}.teacher={term.teacher} does not exist")


def _stand_in(state: State) -> nn.Module:
    """A network of the dense one's architecture: the present one, where no stage made another."""
    if state.parent is None or state.parent.node == state.architecture.node:
        return state.model
    return state.parent.build().to(state.device).eval()


def _checked(state: State, term: Term, key: str) -> Teacher:
    assert term.teacher is not None
    teacher = load_teacher(state, term.teacher)
    if (classes := _classes(state, teacher)) != state.data.num_classes:
        raise ConfigError(
            f"{state.stage}: {key}.teacher={term.teacher} tells {classes} classes apart, "
            f"but dataset has {state.data.num_classes}"
        )
    return teacher


def _check_cache(state: State, term: Term, key: str) -> None:
    if term.cache != "store":
        return
    if term.features:
        raise ConfigError(
            f"{state.stage}: {key}.cache=store keeps logits, but this term compares features; give {key}.cache=auto"
        )
    if (views := listed(state)) is None:
        raise ConfigError(
            f"{state.stage}: {key}.cache=store keeps logits of every augmented image, but those of dataset="
            f"{state.data.name} cannot be listed; give {key}.cache=live"
        )
    if (wanted := _bytes(views, state.data.num_classes)) > MOST_BYTES:
        raise ConfigError(
            f"{state.stage}: {key}.cache=store would keep {wanted / 1e9:.1f} GB, more than {MOST_BYTES / 1e9:.1f}; give "
            f"{key}.cache=live, or less augmentation (dataset.crop_padding)"
        )


def _prepared(state: State, term: Term, teacher: nn.Module, key: str) -> Taught:
    images = state.example_inputs().repeat(2, 1, 1, 1)
    try:
        return prepared(term, state.model, teacher, images, key=key, seed=derive_seed(state.stage_seed, key))
    except PruneError as error:
        raise type(error)(f"{state.stage}: {error}") from error


def objective(state: State, distillation: Distillation, training: Training, epochs: int | None) -> Loss:
    """The loss of a stage that may have teachers, for `state.model` as it is now.

    A teacher that is named twice runs once.

    Args:
        epochs: of the whole training; None where nobody knows.

    Raises:
        Interrupted: the user asked to stop while a teacher's table was computed.
    """
    terms, tabled = [], []
    for key, term in distillation.all_terms.items():
        assert term.teacher is not None, "checked before anything was trained"
        teacher = load_teacher(state, term.teacher)
        terms.append((term, teacher, _prepared(state, term, teacher.model, key)))
        tabled.append(_looks_up(state, term, _classes(state, teacher), training, epochs or 1))
    if not terms:
        return learning.cross_entropy(training.label_smoothing)
    running = {teacher for (_, teacher, _), looks_up in zip(terms, tabled, strict=True) if not looks_up}
    tables: dict[Teacher, Tensor] = {}
    taught = []
    for (_, teacher, ready), looks_up in zip(terms, tabled, strict=True):
        if looks_up and teacher not in running:
            if teacher not in tables:
                tables[teacher] = _table(state, teacher, training)
            ready = replace(ready, table=tables[teacher])
        taught.append(ready)
    return Objective(state.model, taught, distillation.weights[1], training.label_smoothing)


# ------------------------------------------------------------------------------------------------ tables of logits


def listed(state: State) -> Views | None:
    """The training images in every augmentation, where the dataset can list these; one of the user's own need not."""
    return getattr(state.data, "views", None)


def _looks_up(state: State, term: Term, classes: int, training: Training, epochs: int) -> bool:
    """Whether a term's teacher is looked up: it depends on the recipe alone, never on what is in the store.

    `auto` does so where the teacher then looks at no more images than in this training alone, and the table is small.
    """
    views = listed(state)
    if term.cache == "live" or term.features or views is None:
        return False
    steps = len(state.data.train(training.batch_size, 0))
    looked_at = epochs * min(steps * training.batch_size, state.data.sizes["train"])
    return term.cache == "store" or (len(views) <= looked_at and _bytes(views, classes) <= MOST_BYTES)


def _bytes(views: Views, classes: int) -> int:
    return 4 * classes * len(views)


def _classes(state: State, teacher: Teacher) -> int:
    with torch.no_grad():
        return int(teacher.model(state.example_inputs()).shape[1])


def _table(state: State, teacher: Teacher, training: Training) -> Tensor:
    """The teacher's logits by place among the views, the same on every rank; rank 0 reads and writes."""
    views, world, found = listed(state), state.world, None
    assert views is not None
    if world.main:
        low, last = lowered(training.fit.precision, state.device), training.fit.channels_last
        what = f"{state.stage}, logits of the teacher"
        found = table(
            Store(state.slot.folder.parent),
            _key(state, teacher, views, {"bf16": low, "channels_last": last}),
            (len(views), _classes(state, teacher)),
            functools.partial(logits_of, teacher.model, views, lowered=low, channels_last=last, what=what),
            what=what,
            stop=state.interrupted if world.size == 1 else lambda: False,
        )
    return world.broadcast_tensors(None if found is None else {"logits": found})["logits"].to(state.device)


def _key(state: State, teacher: Teacher, views: Views, arithmetic: Mapping[str, bool]) -> str:
    """Of all that decides the numbers in a table: network, weights, images, augmentation, arithmetic and our code."""
    used = [teacher.node, *({"_target_": f"{module}.-"} for module in (logits_of.__module__, type(views).__module__))]
    lineage = None if teacher.lineage is None else teacher.lineage.to_dict()
    return key_of(
        "", "logits", content_key(teacher.node), lineage, state_sha256(teacher.model.state_dict()), views.fingerprint,
        arithmetic, code_behind(used),
    )  # fmt: skip
