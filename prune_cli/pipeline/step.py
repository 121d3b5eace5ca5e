"""A pipeline and its steps, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prune_cli.pipeline.stage import Parameters, Stage, training_of
from prune_cli.pipeline.state import State
from prune_cli.training.distributed import World
from prune_cli.training.training import Training

INITIAL = "initial"
CHOICES = ("criterion", "granularity", "schedule", "distillation")


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline.

    Attributes:
        name: unique in the pipeline: the stage's name, with its occurrence where it repeats.
        run: state -> State.
        content: hash of the stage's parameters, the files they name and the user code in them.
        choices: names of the options that the stage uses, for the table.
        code: our own modules that the result depends on, with their hashes; see `code.code_behind`.
        stage: what the stage declares.
        parameters: what the recipe bound to the parameters of the stage's function.
    """

    name: str
    run: Callable[[State], State]
    content: str
    choices: Mapping[str, str | None]
    code: Mapping[str, str] = field(default_factory=dict)
    stage: Stage = field(default_factory=Stage)
    parameters: Parameters = field(default_factory=dict)

    @property
    def epochs(self) -> int | None:
        """Epochs of training at most: 0 for none, None where nobody knows beforehand."""
        return self.stage.trains(self.parameters)

    @property
    def tries(self) -> bool:
        """Whether it also tries candidates out, for longer than anybody knows beforehand."""
        return self.stage.tries(self.parameters)

    @property
    def training(self) -> Training | None:
        """How it trains, if it does."""
        return training_of(self.parameters)


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline, ready to run: the first state, the steps and the key of what they start from.

    Attributes:
        measured: whether the network that the first stage gets has a row of its own.
        trained: whether it was trained; where it was not, nothing is compared with its accuracy.
        code: our own modules behind the network and the data; each step's `code` has them too.
    """

    state: State
    steps: tuple[Step, ...]
    root_key: str
    labels: Mapping[str, Any]
    measured: bool
    trained: bool
    code: Mapping[str, str]


def within(pipeline: Pipeline, interrupted: Callable[[], bool], world: World) -> Pipeline:
    """The pipeline among its processes, with a function that tells its stages when the user asked to stop."""
    return replace(pipeline, state=pipeline.state.evolve(interrupted=interrupted, world=world))
