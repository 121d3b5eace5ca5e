"""From a composed config to a list of stages, and the only loop over them.

`build` resolves and checks everything before anything is trained. `run` carries the state from stage to stage,
taking from the store what is there and adding what is not.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prune_cli.config.content import content_key
from prune_cli.config.nodes import resolve, validate
from prune_cli.config.schema import check_root
from prune_cli.console import Console
from prune_cli.data.dataset import Dataset
from prune_cli.errors import CheckpointError, ConfigError, first_line
from prune_cli.files.weights import load_weights
from prune_cli.models.arguments import new_layers
from prune_cli.pipeline.checks import check_stage
from prune_cli.pipeline.code import code_behind
from prune_cli.pipeline.loading import build_architecture
from prune_cli.pipeline.stage import declaration
from prune_cli.pipeline.state import State
from prune_cli.pipeline.step import CHOICES, Pipeline, Step
from prune_cli.pipeline.store import Store, key_of
from prune_cli.tensors import not_finite, state_sha256
from prune_cli.training.distributed import local_device
from prune_cli.training.precision import has_bf16

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
    _warn_of_bf16(steps, state.device)
    _warn_of_new_layers(steps, state)
    check_steps(steps, state)
    model, data = config["model"], state.data
    parts = (content_key(model), state_sha256(state.model.state_dict()), data.fingerprint, state.seed)
    root_key = key_of("", *parts, content_key(_without_place(config["dataset"])), config.get("limit_batches"))
    labels = {"seed": state.seed} | {group: choices.get(group) for group in ("recipe", "model", "dataset")}
    trained = bool(model.get("weights")) or (bool(model.get("pretrained")) and not new_layers(state.model))
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
        load_weights(model, validate(weights, "model.weights", Path))
    if broken := not_finite(dict(model.named_parameters())):
        raise CheckpointError(f"model={architecture.name}: {broken[0]} has values that are not finite numbers")
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
        if step.stage.removes and state.dense is None:  # from here on there is a dense network to learn from
            state = state.evolve(dense=state.slot.folder.parent, parent=state.architecture)
        state = check_stage(state.evolve(stage=step.name), step.stage, step.parameters)
        if step.stage.trains(step.parameters) != 0:
            state = state.evolve(trained_by=step.name)


def _step(
    stage: str, occurrence: int, node: Mapping[str, Any], origin: Sequence[Any], choices: Mapping[str, str]
) -> Step:
    """A step from its node; `origin`: the nodes of the network and the data that it starts from."""
    run = resolve(node, stage, runtime=("state",))
    name = stage if occurrence == 1 else f"{stage}_{occurrence}"
    here = {group: choices.get(f"{group}@{stage}.{group}", choices.get(group)) for group in CHOICES}
    used = {group: name if group in node else None for group, name in here.items()}
    used["model"] = choices.get(f"model@{stage}.network")
    code = code_behind([node, *origin])
    return Step(
        name, run, content_key(_without_pace(node)), used, code, declaration(run.func, run.keywords), run.keywords
    )


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


def _warn_of_bf16(steps: Sequence[Step], device: torch.device) -> None:
    names = [step.name for step in steps if step.training is not None and step.training.fit.precision == "bf16"]
    if names and not has_bf16(device):
        log.warning(
            "%s: this %s has no instructions for bf16, which would be many times slower: float32 is taken; "
            "%s.fit.precision=bf16! insists",
            ", ".join(names), device.type, names[0],
        )  # fmt: skip


def _warn_of_new_layers(steps: Sequence[Step], state: State) -> None:
    """Says that the network was not trained as a whole, and what comes of it where pruning comes first."""
    if not (names := new_layers(state.model)):
        return
    consequence = ""
    if steps[0].stage.removes:
        consequence = (
            f"; {steps[0].name} chooses before it was ever trained: train first, as recipe=transfer_filter does"
        )
    log.warning(
        "model=%s: %s is new, as the pretrained weights are for other classes than the %d of %s%s",
        state.architecture.name, ", ".join(names), state.data.num_classes, state.data.name, consequence,
    )  # fmt: skip


DEVICES = ("cuda", "mps", "cpu")


def choose_device(name: object) -> torch.device:
    """`auto` takes cuda, then mps, then cpu.

    Raises:
        ConfigError: the device is not there.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    kind, _, index = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in DEVICES or (index and not re.fullmatch(r"\d{1,3}", index)) or str(name).endswith(":"):
        raise ConfigError(f"device: {name!r} is not a device; use auto, cpu, cuda, cuda:1 or mps")
    device = torch.device(str(name))
    there = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 1
    if int(index or 0) >= there:
        raise ConfigError(f"device: there is no {name}; this machine has {kind}:0 to {kind}:{there - 1}")
    if (device.type == "cuda" and not torch.cuda.is_available()) or (device.type == "mps" and not mps):
        raise ConfigError(f"device: this machine or this build of torch has no {device.type}; use device=cpu or auto")
    return device


def _numerics(config: Mapping[str, Any]) -> None:
    if config.get("deterministic"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be reproducible
    if (threads := config.get("threads")) is not None:
        most = max(64, 4 * (os.cpu_count() or 1))  # thousands would need memory for their stacks, and help nobody
        if not 1 <= int(threads) <= most:
            raise ConfigError(f"threads={threads}: must be at least 1 and at most {most}, or null for torch's choice")
        torch.set_num_threads(int(threads))
    torch.use_deterministic_algorithms(bool(config.get("deterministic")), warn_only=False)
    torch.backends.cudnn.deterministic = bool(config.get("deterministic"))
    torch.backends.cudnn.benchmark = not config.get("deterministic")


def build_data(config: Mapping[str, Any], device: torch.device) -> Dataset:
    """The dataset of a config, on the device, cut to `limit_batches` where that is set."""
    data: Dataset = resolve(config["dataset"], "dataset")
    if missing := [name for name in ("limit", "to", "train", "evaluation", "sizes") if not hasattr(data, name)]:
        target = config["dataset"].get("_target_") if isinstance(config["dataset"], Mapping) else None
        raise ConfigError(
            f"dataset._target_={target}: makes a {type(data).__name__}, which is no dataset: it has no {missing[0]}"
            "; see `prune list dataset`"
        )
    return data.limit(config.get("limit_batches")).to(device)


def _without_pace(node: Mapping[str, Any]) -> dict[str, Any]:
    """A stage node without what changes no byte of its result: how often it can be resumed."""
    fit = node.get("fit")
    if not isinstance(fit, Mapping):
        return dict(node)
    return {**node, "fit": {key: value for key, value in fit.items() if key != "checkpoint_seconds"}}


def _without_place(node: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset node without what does not change the data: its folder and how it is read."""
    return {key: value for key, value in node.items() if key not in ("root", "download", "workers", "cache")}
