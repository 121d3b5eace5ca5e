"""What a stage says of itself, so that nothing has to be guessed from the names of its parameters.

    @Stage(check=check, trains=own_epochs, removes=True)
    def prune_somehow(state: State, *, epochs: Epochs, training: Annotated[Training, Flat()]) -> State: ...

A recipe's `_target_` names the function; the decorator attaches the declaration to it and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from prune_cli.granularities.units import Units
from prune_cli.pipeline.state import State
from prune_cli.selection.granularity import Granularity
from prune_cli.training.fit import DEFAULTS
from prune_cli.training.lr_schedules import constant
from prune_cli.training.training import Training

Parameters = Mapping[str, Any]
"""What a recipe bound to the parameters of a stage's function, by name."""

Function = TypeVar("Function", bound=Callable[..., State])

ATTRIBUTE = "__stage__"


def never(parameters: Parameters) -> int:
    """For stages that do not train."""
    return 0


def no_candidates(parameters: Parameters) -> bool:
    """For stages that try nothing out."""
    return False


def own_epochs(parameters: Parameters) -> int:
    """For stages that train as long as their parameter `epochs` says."""
    return int(parameters.get("epochs", 0))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The declaration of a stage, and the decorator that attaches it.

    Attributes:
        check: refuses, before anything is trained, what cannot work. Called with the state as it will enter the stage, as
            far as that is known then (its weights are those from before the first stage), and with those of the stage's
            parameters that it names. Returns the state for the checks of later stages where it changes.
        trains: epochs of training at most, from the stage's parameters: 0 for none, None where nobody knows beforehand.
        tries: whether it also tries candidates out, which nobody can count beforehand.
        removes: takes weights away; the network that enters the first such stage is the dense one.
        becomes: (state, parameters) -> the state after it but for the network's weights, where it makes another network.
        reads_weights: chooses among the weights or channels of layers, which must be plain ones then.
        final: None, or why no stage may follow, as the end of a sentence that begins with the later stage;
            `{stage}` stands for this one's name.
        granularities: classes of units that it works with; empty for all.
    """

    check: Callable[..., State | None] | None = None
    trains: Callable[[Parameters], int | None] = never
    tries: Callable[[Parameters], bool] = no_candidates
    removes: bool = False
    becomes: Callable[[State, Parameters], State] | None = None
    reads_weights: bool = False
    final: str | None = None
    granularities: tuple[type[Units], ...] = ()

    def __call__(self, function: Function) -> Function:
        """Attaches the declaration to the stage's function, as a decorator."""
        setattr(function, ATTRIBUTE, self)
        return function


def declaration(function: Callable[..., Any], parameters: Parameters) -> Stage:
    """What a stage's function declares.

    A plain function of a user's own may declare nothing: it trains for its `epochs`, if it has such a parameter, and one
    that is given a granularity is taken to remove something by it.
    """
    if isinstance(found := getattr(function, ATTRIBUTE, None), Stage):
        return found
    prunes = any(isinstance(value, Granularity) for value in parameters.values())
    return Stage(trains=own_epochs, removes=prunes, reads_weights=prunes)


def training_of(parameters: Parameters) -> Training | None:
    """How a stage trains, if it does; of a function that takes the fields of `Training` one by one, these together."""
    if (found := next((value for value in parameters.values() if isinstance(value, Training)), None)) is not None:
        return found
    if not {"batch_size", "optimizer"} <= parameters.keys():
        return None
    own = {field.name: parameters[field.name] for field in fields(Training) if field.name in parameters}
    return Training(**{"lr_schedule": constant, "fit": DEFAULTS, **own})
