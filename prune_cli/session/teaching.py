"""From a distillation option to the loss of a stage, and what can be wrong with it before anything is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from prune_cli.data.dataset import Loss
from prune_cli.distillation.distillation import Distillation, Term
from prune_cli.distillation.objective import Objective, Taught, prepared
from prune_cli.errors import ConfigError, PruneError
from prune_cli.pipeline.loading import load_teacher
from prune_cli.pipeline.state import State, derive_seed
from prune_cli.session import learning


def check(state: State, distillation: Distillation) -> None:
    """Refuses teachers that will not be there, cannot be read or have other classes, and features that are not there.

    The teacher `dense` does not exist yet: the network as it is stands for it.

    Raises:
        ConfigError: says which key to change.
        CheckpointError: see `load_teacher`.
    """
    teachers: dict[Path, nn.Module] = {}
    for key, term in distillation.all_terms.items():
        _check_teacher(state, term, key)
        assert term.teacher is not None
        teacher = state.model
        if isinstance(term.teacher, Path):
            path = term.teacher.resolve()
            if path not in teachers:
                teachers[path] = _load(state, term.teacher, key)
            teacher = teachers[path]
        _prepared(state, term, teacher, key)


def _check_teacher(state: State, term: Term, key: str) -> None:
    if term.teacher is None:
        raise ConfigError(f"{state.stage}: {key}.loss learns from a teacher: give {key}.teacher=dense or a PATH")
    if term.teacher == "dense" and state.dense is None:
        raise ConfigError(
            f"{state.stage}: {key}.teacher=dense is the network before the first pruning stage, but none comes "
            f"before; give {key}.teacher=PATH"
        )
    if isinstance(term.teacher, Path) and not term.teacher.exists():
        raise ConfigError(f"{state.stage}: {key}.teacher={term.teacher} does not exist")


def _load(state: State, path: Path, key: str) -> nn.Module:
    teacher = load_teacher(state, path)
    with torch.no_grad():
        found = teacher(state.example_inputs())
    if found.shape != (1, state.data.num_classes):
        raise ConfigError(
            f"{state.stage}: {key}.teacher={path} tells {found.shape[1]} classes apart, "
            f"but dataset has {state.data.num_classes}"
        )
    return teacher


def _prepared(state: State, term: Term, teacher: nn.Module, key: str) -> Taught:
    images = state.example_inputs().repeat(2, 1, 1, 1)
    try:
        return prepared(term, state.model, teacher, images, key=key, seed=derive_seed(state.stage_seed, key))
    except PruneError as error:
        raise type(error)(f"{state.stage}: {error}") from error


def objective(state: State, distillation: Distillation, label_smoothing: float) -> Loss:
    """The loss of a stage that may have teachers, for `state.model` as it is now.

    A teacher that is named twice is loaded, and runs, once.
    """
    teachers: dict[Path, nn.Module] = {}
    terms = []
    for key, term in distillation.all_terms.items():
        assert term.teacher is not None, "checked before anything was trained"
        path = state.dense if term.teacher == "dense" else term.teacher
        assert path is not None, "checked before anything was trained"
        path = path.resolve()
        if path not in teachers:
            teachers[path] = load_teacher(state, term.teacher)
        terms.append(_prepared(state, term, teachers[path], key))
    if not terms:
        return learning.cross_entropy(label_smoothing)
    return Objective(state.model, terms, distillation.weights[1], label_smoothing)
