"""From a composed config to a list of stages, and the only loop over them.

`build` resolves and checks everything before anything is trained. `run` carries the state from stage to stage,
taking from the store what is there and adding what is not.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prune_cli.config.content import content_key
from prune_cli.config.nodes import resolve
from prune_cli.config.schema import check_root
from prune_cli.console import Console
from prune_cli.data.dataset import Dataset
from prune_cli.errors import ConfigError, first_line
from prune_cli.files.weights import load_weights
from prune_cli.pipeline.checks import check_stage
from prune_cli.pipeline.code import code_behind
from prune_cli.pipeline.loading import build_architecture
from prune_cli.pipeline.stage import declaration
from prune_cli.pipeline.state import State
from prune_cli.pipeline.step import CHOICES, Pipeline, Step
from prune_cli.pipeline.store import Store, key_of
from prune_cli.tensors import state_sha256
from prune_cli.training.distributed import local_device

log = logging.getLogger(__name__)


def build(config: dict[str, Any], choices: Mapping[str, str], console: Console, store: Store) -> Pipeline:
    """Resolves every node and checks names, types, legality and data.

    Args:
        config: a composed config as plain data.
        choices: option chosen per group, for tables.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong, before anything is trained.
    """
    order = check_root(config)
    if config["dataset"].get("fake") and config["model"].get("pretrained"):
        log.info("dataset.fake=true: no pretrained weights are fetched for made-up images")
        config = config | {"model": config["model"] | {"pretrained": False}}
    steps = resolve_steps(order, config, choices)
    state = first_state(config, choices, console, store)
    check_steps(steps, state)
    model, data = config["model"], state.data
    parts = (content_key(model), state_sha256(state.model.state_dict()), data.fingerprint, state.seed)
    root_key = key_of("", *parts, content_key(_without_place(config["dataset"])), config.get("limit_batches"))
    labels = {"seed": state.seed} | {group: choices.get(group) for group in ("recipe", "model", "dataset")}
    trained = bool(model.get("weights")) or bool(model.get("pretrained"))
    code = code_behind([model, config["dataset"]])
    return Pipeline(state, steps, root_key, labels, trained or steps[0].stage.removes, trained, code)


def resolve_steps(order: Sequence[str], config: Mapping[str, Any], choices: Mapping[str, str]) -> tuple[Step, ...]:
    """The stages as functions of a state, their keys and types checked.

    Args:
        order: names of stage nodes of the config; a name may repeat.
        config: the stages' nodes, with those of the network and the data.

    Raises:
        ConfigError: an unknown key or an ill-typed value.
    """
    seen: Counter[str] = Counter()
    origin = config["model"], config["dataset"]
    steps = []
    for stage in order:
        seen[stage] += 1
        steps.append(_step(stage, seen[stage], config[stage], origin, choices))
    return tuple(steps)


def first_state(config: Mapping[str, Any], choices: Mapping[str, str], console: Console, store: Store) -> State:
    """The data and the network that the first stage gets, checked to fit each other.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong with them.
    """
    device = local_device(choose_device(config.get("device", "auto")))
    _numerics(config)
    data = build_data(config, device)
    architecture = build_architecture(config["model"], data, choices.get("model", ""), int(config["seed"]))
    model = architecture.build()
    if weights := config["model"].get("weights"):
        load_weights(model, Path(weights))
    state = State(
        model=model.to(device),
        data=data,
        architecture=architecture,
        device=device,
        seed=int(config["seed"]),
        console=console,
        slot=store.slot("unused"),
    )
    _check_outputs(state)
    return state


def check_steps(steps: Sequence[Step], state: State) -> None:
    """Asks every stage, in order, whether it can do its part; nothing is trained, and the network stays as it is.

    Raises:
        ConfigError, CheckpointError: why not, and what would be legal.
    """
    _check_order(steps)
    for step in steps:
        if step.stage.removes:
            state = state.evolve(dense=state.slot.folder.parent)  # from here on there is a dense network to learn from
        state = check_stage(state.evolve(stage=step.name), step.stage, step.parameters)


def _step(
    stage: str, occurrence: int, node: Mapping[str, Any], origin: Sequence[Any], choices: Mapping[str, str]
) -> Step:
    """A step from its node; `origin`: the nodes of the network and the data that it starts from."""
    run = resolve(node, stage, runtime=("state",))
    name = stage if occurrence == 1 else f"{stage}_{occurrence}"
    used = {group: choices.get(group) if group in node else None for group in CHOICES}
    code = code_behind([node, *origin])
    return Step(name, run, content_key(node), used, code, declaration(run.func, run.keywords), run.keywords)


def _check_outputs(state: State) -> None:
    """Runs one image through the network, so that one that does not fit the data is refused before training.

    Raises:
        ConfigError: it fails, or does not give a logit per class.
    """
    name, shape, classes = state.architecture.name, tuple(state.data.shape), state.data.num_classes
    state.model.eval()
    try:
        with torch.no_grad():
            found = state.model(state.example_inputs())
    except Exception as error:  # a network of the user's own can raise anything
        reason = first_line(error)
        raise ConfigError(f"model={name} fails on images of {shape}: {type(error).__name__}: {reason}") from error
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"model={name} returns a {type(found).__name__}; it must return logits, a tensor")
    if found.dim() != 2 or len(found) != 1 or found.shape[1] < classes:
        raise ConfigError(
            f"model={name} returns {tuple(found.shape)} for one image; it must return (1, {classes}), a logit per class"
        )


def _check_order(steps: Sequence[Step]) -> None:
    """Refuses stages that would undo what an earlier one is there for.

    Raises:
        ConfigError: names both.
    """
    final: Step | None = None
    for step in steps:
        if step.stage.final is not None:
            final = step
        elif final is not None:
            assert final.stage.final is not None
            why = final.stage.final.format(stage=final.name)
            raise ConfigError(f"stages: {step.name} after {final.name} {why}")


def choose_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu.

    Raises:
        ConfigError: the device is not there.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a device; use auto, cpu, cuda or mps") from error
    if (device.type == "cuda" and not torch.cuda.is_available()) or (device.type == "mps" and not mps):
        raise ConfigError(f"device: this machine or this build of torch has no {device.type}; use device=cpu or auto")
    return device


def _numerics(config: Mapping[str, Any]) -> None:
    if config.get("deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be reproducible
    if (threads := config.get("threads")) is not None:
        if int(threads) < 1:
            raise ConfigError(f"threads={threads}: must be at least 1, or null for torch's choice")
        torch.set_num_threads(int(threads))
    torch.use_deterministic_algorithms(bool(config.get("deterministic")), warn_only=False)
    torch.backends.cudnn.deterministic = bool(config.get("deterministic"))
    torch.backends.cudnn.benchmark = not config.get("deterministic")


def build_data(config: Mapping[str, Any], device: torch.device) -> Dataset:
    """The dataset of a config, on the device, cut to `limit_batches` where that is set."""
    data: Dataset = resolve(config["dataset"], "dataset")
    return data.limit(config.get("limit_batches")).to(device)


def _without_place(node: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset node without what does not change the data: its folder and how it is read."""
    return {key: value for key, value in node.items() if key not in ("root", "download", "workers", "cache")}
