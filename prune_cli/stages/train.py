"""Training from the network's initial weights, or of a pruned architecture from scratch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from prune_cli.config.locations import find_file
from prune_cli.config.nodes import Flat, locate, parameters_of
from prune_cli.errors import ConfigError, nearest
from prune_cli.files import pruned
from prune_cli.measure import cost
from prune_cli.models.arguments import new_layers
from prune_cli.pipeline.loading import build_architecture
from prune_cli.pipeline.stage import Stage, own_epochs
from prune_cli.pipeline.state import Architecture, State
from prune_cli.session import learning
from prune_cli.session.remembering import moment
from prune_cli.structure.prunable import Target, layers
from prune_cli.training.fit import Epochs
from prune_cli.training.training import Training

log = logging.getLogger(__name__)

Only = Literal["head"] | Annotated[tuple[str, ...], Field(min_length=1)] | None
"""Which part of a network is trained."""

CFG = "cfg:"
MOST = 2  # epochs of an equal-compute training, relative to the dense network's (arXiv:1810.05270, section 3)


def check(
    state: State,
    *,
    epochs: Epochs,
    training: Training,
    init: str | None = None,
    init_budget: Literal["epochs", "compute"] = "epochs",
    remember: tuple[str | int, ...] = (),
    only: Only = None,
) -> State:
    """Refuses moments that the training does not reach, a cfg that does not fit the network, and modules that it has not.

    Returns:
        the state as later stages will find it: with what will be remembered, and with `init` of a network that nothing
        was taken out of.
    """
    steps = -(-len(state.data.train(training.batch_size, 0)) // training.fit.accumulate)
    for tag in remember:
        if moment(tag, steps) > epochs * steps and init_budget == "epochs":
            raise ConfigError(
                f"{state.stage}.remember: {tag} comes after the end of {epochs} epochs of {steps} steps each"
            )
    state = state.evolve(remembered={**state.remembered, **{str(tag): Path() for tag in remember}})
    if only is not None:
        if init is not None:
            raise ConfigError(f"{state.stage}.only={only} trains a part of the network, but init makes all of it new")
        trained_modules(state, only)
    if init is not None:
        with torch.device("meta"):
            architecture(state, init).build()
        return state.evolve(shrunk_by=None)
    if init_budget != "epochs":
        raise ConfigError(f"{state.stage}.init_budget=compute is for {state.stage}.init=cfg:PATH, which is not given")
    return state


@Stage(check=check, trains=own_epochs)
def train(
    state: State,
    *,
    epochs: Epochs,
    training: Annotated[Training, Flat()],
    init: str | None = None,
    init_budget: Literal["epochs", "compute"] = "epochs",
    remember: tuple[str | int, ...] = (),
    only: Only = None,
) -> State:
    """Minimises cross entropy on the training split.

    Args:
        epochs: passes over the training split.
        init: None trains the network as it is; `cfg:PATH` trains one with the widths of that file and fresh weights
            (from scratch in Liu et al., arXiv:1810.05270).
        init_budget: with `init`: `epochs` trains as long as told (Scratch-E), `compute` as many more epochs as the
            network has fewer MACs than the dense one, at most twice as many (Scratch-B).
        remember: moments of which a snapshot is kept, for schedules that go back to it: 0, steps as `500st`, epochs as
            `3ep`.
        only: the modules whose weights are trained; `head` = the new layers of a pretrained network, else its last layer
            with an output per class; None = all. Norm statistics follow the data everywhere.
    """
    if init is not None:
        dense = state
        state = _from_scratch(state, init)
        epochs = _epochs(epochs, dense, state, init_budget)
    with _held(state.model, None if only is None else trained_modules(state, only)):
        return learning.trained(
            state,
            learning.cross_entropy(training.label_smoothing),
            epochs=epochs,
            training=training,
            remember=tuple(map(str, remember)),
        )


def trained_modules(state: State, only: Literal["head"] | tuple[str, ...]) -> tuple[str, ...]:
    """The modules that `only` means.

    Raises:
        ConfigError: a module that is not there or has no weights, or a network without such a last layer.
    """
    modules = dict(state.model.named_modules())
    if only == "head":
        if names := new_layers(state.model):
            return names
        classes = state.data.num_classes
        last = [name for name, module in layers(state.model).items() if Target(name, module).channels == classes]
        if not last:
            raise ConfigError(
                f"{state.stage}.only=head: no layer of model={state.architecture.name} has {classes} outputs; name the "
                f"modules: {state.stage}.only=[...]"
            )
        return (last[-1],)
    for name in only:
        if name not in modules:
            raise ConfigError(f"{state.stage}.only: there is no module {name!r}{nearest(name, modules)}")
        if not any(True for _ in modules[name].parameters()):
            raise ConfigError(f"{state.stage}.only: {name} has no weights to train")
    return tuple(only)


@contextmanager
def _held(model: nn.Module, only: Sequence[str] | None) -> Iterator[None]:
    """Holds the weights outside of some modules while the context lasts; None holds nothing."""
    free = [] if only is None else [p for name in only for p in model.get_submodule(name).parameters()]
    kept = {id(parameter) for parameter in free}
    held = [p for p in model.parameters() if p.requires_grad and id(p) not in kept] if only is not None else []
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def architecture(state: State, init: str) -> Architecture:
    """The architecture of the run's model with the widths of a file.

    Raises:
        ConfigError: `init` has another form, or the model is not built from a cfg.
    """
    if not init.startswith(CFG):
        raise ConfigError(f"{state.stage}.init: {init!r} is not null or cfg:PATH, such as cfg:outputs/.../pruned.yaml")
    widths = pruned.read_cfg(find_file(Path(init.removeprefix(CFG))))
    node = state.architecture.node
    parameters = parameters_of(locate(node["_target_"], "model"), "model")
    if missing := [key for key in widths if key not in parameters]:
        raise ConfigError(
            f"{state.stage}.init: model={state.architecture.name} is not built from a {missing[0]}; choose the model "
            "that the file was made from, such as vgg16 or resnet18"
        )
    try:
        return build_architecture({**node, **widths}, state.data, state.architecture.name, state.seed)
    except TypeError as error:
        raise ConfigError(f"{state.stage}.init: {error}") from error


def _from_scratch(state: State, init: str) -> State:
    """The state with a fresh network of the widths of a file: nothing that was trained or masked is left."""
    fresh = architecture(state, init)
    return state.evolve(architecture=fresh, model=fresh.build().to(state.device), masks={}, lineage=None)


def _epochs(epochs: int, dense: State, small: State, budget: Literal["epochs", "compute"]) -> int:
    full = cost.cost(dense.architecture.build(), dense.data.shape)
    left = cost.cost(small.model, small.example_inputs())
    if budget == "compute":
        epochs = round(epochs * min(Fraction(full.macs, max(left.macs, 1)), Fraction(MOST)))
    log.info(
        "%s: from scratch, %d of %d params, %d of %d MACs, %d epochs",
        small.stage, left.params, full.params, left.macs, full.macs, epochs,
    )  # fmt: skip
    return epochs
