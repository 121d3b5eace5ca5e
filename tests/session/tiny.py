"""A prune stage on a tiny network, called as a function: nothing of a run around it but its slot."""

from __future__ import annotations

import copy
import csv
import functools
import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from prune_cli.config.compose import compose
from prune_cli.config.nodes import resolve
from prune_cli.console import Console
from prune_cli.criteria import movement, weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Calibration
from prune_cli.data.fake import fake
from prune_cli.distillation.distillation import Distillation
from prune_cli.files import artifacts
from prune_cli.granularities.filter import Filter
from prune_cli.pipeline.state import Architecture, Outcome, State
from prune_cli.pipeline.store import Slot
from prune_cli.selection.granularity import Granularity
from prune_cli.session import search_table
from prune_cli.session.journal import Journal
from prune_cli.session.session import Session
from prune_cli.stages.prune import prune
from prune_cli.tensors import state_sha256
from prune_cli.training.distributed import ALONE
from prune_cli.training.fit import Options
from prune_cli.training.training import Training

DATA = fake((3, 8, 8), 4, train=56, test=16, val=8)
L2 = Criterion(weights.l2)
NOTHING = Distillation()
MOVEMENT = Criterion(movement.movement, needs=("movement",))
NEVER, ALWAYS = 1e9, 0.0
SHORT = {
    "epochs": 4, "retrain_epoch": 3, "prune_freq": 2, "iterations": 2, "epochs_per_iteration": 1, "retrain_epochs": 1,
    "updates": 2, "every": 1, "soft_epochs": 3, "rounds": 2, "step": 0.2, "candidates": 4, "grid": [0.5], "delta": 100.0,
    "halvings": 0, "episodes": 4, "warmup": 2, "warmup_epochs": 1, "cooldown_epochs": 1, "compressed_epochs": 1,
    "decompressed_epochs": 1, "final_epochs": 1,
}  # fmt: skip

STEPS = {"rigl": 4, "set": 5, "movement": 3}
"""`every` of the schedules that count optimizer steps: some of each epoch's three."""


class Cut(BaseException):
    """What a kill is in another process: nothing catches it."""


def network(seed: int = 1) -> nn.Module:
    """Two convolutions with norms, dropout and a classifier: what has state or draws random numbers is there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 4),
        )  # fmt: skip


def begin(place: Path, **changes) -> State:
    """The state that comes to the stage, in a process that has just begun: always the same weights."""
    torch.manual_seed(7)
    state = State(
        model=network(),
        data=DATA,
        architecture=Architecture(lambda purpose="model": network(2 if purpose == "model" else 3), {}, "tiny"),
        device=torch.device("cpu"),
        seed=0,
        console=Console(),
        slot=Slot(place),
        stage="prune",
        outcome=Outcome(),
    )
    return state.evolve(**changes)


def run(
    state: State,
    schedule: Callable,
    granularity: Granularity | None = None,
    criterion: Criterion = L2,
    *,
    seconds: float = NEVER,
    distillation: Distillation = NOTHING,
    plots: bool = False,
) -> State:
    """The stage with a schedule; it writes checkpoints `NEVER` or `ALWAYS`. A plot takes longer than all the rest."""
    with nullcontext() if plots else patch.object(search_table, "plot", lambda *_: ""):
        return prune(
            state,
            criterion=criterion,
            granularity=granularity or Granularity(Filter(), 0.5),
            schedule=schedule,
            distillation=distillation,
            training=training(seconds),
            calibration=Calibration(16, 8),
        )


def stage_session(state: State, granularity: Granularity) -> Session:
    """What the stage works on, before its schedule asks for anything."""
    return Session(
        state, criterion=L2, granularity=granularity, calibration=Calibration(16, 8), distillation=Distillation(),
        training=training(),
    )  # fmt: skip


def training(seconds: float = NEVER) -> Training:
    """Momentum and a rate that falls: what has to be taken along, and told where it is."""
    return Training(
        batch_size=16,
        optimizer=functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        lr_schedule=lambda now, epochs: 1 - 0.9 * now / max(epochs, 1),
        fit=Options(checkpoint_seconds=seconds),
    )


@functools.cache
def composed(group: str, name: str) -> dict:
    """The node of a shipped option."""
    return compose(["recipe=quickstart", "criterion=l2", f"{group}={name}"]).config[group]


def option(group: str, name: str, kind: type | None = None, **keys):
    """A shipped option with some of its keys changed, those of `SHORT` among them."""
    node = copy.deepcopy(composed(group, name))
    node |= {key: value for key, value in SHORT.items() if key in node}
    node |= ({"every": STEPS[name]} if name in STEPS else {}) | keys
    return resolve(node, group, kind)


def result(state: State) -> tuple:
    """Everything that a stage gives: weights and masks by their bytes, and what it says of itself.

    The tables of a search without the seconds that candidates took.
    """
    files = {
        name: timeless(content) if name in (artifacts.SEARCH, artifacts.FRONT) else content
        for name, content in state.outcome.files.items()
    }
    return (
        state_sha256(state.model.state_dict()), state_sha256(dict(state.masks)),
        replace(copy.deepcopy(state.outcome), files=files), state.lineage,
    )  # fmt: skip


def timeless(text: str) -> list[dict[str, str]]:
    """The rows of a search's table without seconds."""
    return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(io.StringIO(text))]


def journal(place: Path):
    """What the stage's journal holds."""
    return Journal(place, ALONE).read()


def cut_after(monkeypatch, answers: int) -> None:
    """The process dies when so many answers are in the journal, before anything else happens."""
    answered, count = Journal.answered, 0

    def die(self: Journal, name: str, answer: object) -> None:
        nonlocal count
        answered(self, name, answer)
        count += 1
        if count == answers:
            raise Cut

    monkeypatch.setattr(Journal, "answered", die)


def cut_at_step(monkeypatch, steps: int) -> None:
    """The process dies after so many optimizer steps."""
    step, count = torch.optim.SGD.step, 0

    def die(self: torch.optim.SGD, *arguments):
        nonlocal count
        found = step(self, *arguments)
        count += 1
        if count == steps:
            raise Cut
        return found

    monkeypatch.setattr(torch.optim.SGD, "step", die)
