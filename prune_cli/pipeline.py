"""From a composed config to a list of stages, and the only loop over them.

`build` resolves and checks everything before anything is trained. `run` carries the state from stage to stage,
taking from the store what is there and adding what is not.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prune_cli import artifacts, pruned, rows, shrinking
from prune_cli.artifacts import Row
from prune_cli.checkpoints import load_weights, state_sha256, write_weights
from prune_cli.config import check_root
from prune_cli.console import Console
from prune_cli.data.dataset import Dataset
from prune_cli.errors import ConfigError, Interrupted
from prune_cli.loading import build_architecture, restore
from prune_cli.nodes import content_key, resolve
from prune_cli.processes import World, local_device
from prune_cli.state import Outcome, State, derive_seed
from prune_cli.store import Store, key_of
from prune_cli.surgery import Lineage

log = logging.getLogger(__name__)

Stage = Callable[[State], State]

INITIAL = "initial"
CHOICES = ("criterion", "granularity", "schedule", "distillation")


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline.

    Attributes:
        name: unique in the pipeline: the stage's name, with its occurrence where it repeats.
        run: State -> State.
        content: hash of the stage's parameters, the files they name and the user code in them.
        choices: names of the options that the stage uses, for the table.
    """

    name: str
    run: Stage
    content: str
    choices: Mapping[str, str | None]


@dataclass(frozen=True)
class Pipeline:
    """A checked pipeline, ready to run: the first state, the steps and the key of what they start from.

    Attributes:
        measured: whether the network that the first stage gets has a row of its own.
        trained: whether it was trained; where it was not, nothing is compared with its accuracy.
    """

    state: State
    steps: tuple[Step, ...]
    root_key: str
    labels: Mapping[str, Any]
    measured: bool
    trained: bool


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
    return Pipeline(state, steps, root_key, labels, trained or _prunes(steps[0]), trained)


def resolve_steps(order: Sequence[str], config: Mapping[str, Any], choices: Mapping[str, str]) -> tuple[Step, ...]:
    """The stages as functions of a state, their keys and types checked.

    Args:
        order: names of stage nodes of the config; a name may repeat.

    Raises:
        ConfigError: an unknown key or an ill-typed value.
    """
    seen: Counter[str] = Counter()
    steps = []
    for stage in order:
        seen[stage] += 1
        steps.append(_step(stage, seen[stage], config[stage], choices))
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
        if _prunes(step):
            state = state.evolve(dense=state.slot.folder.parent)  # from here on there is a dense network to learn from
        state = _check(step, state)


def _step(stage: str, occurrence: int, node: Mapping[str, Any], choices: Mapping[str, str]) -> Step:
    run = resolve(node, stage, runtime=("state",))
    name = stage if occurrence == 1 else f"{stage}_{occurrence}"
    used = {group: choices.get(group) if group in node else None for group in CHOICES}
    return Step(name, run, content_key(node), used)


def _prunes(step: Step) -> bool:
    """Whether a stage removes something: the network that enters the first such stage is the dense one."""
    return isinstance(step.run, functools.partial) and {"granularity", "distillation"} <= step.run.keywords.keys()


def _reads_weights(step: Step) -> bool:
    """Whether a stage chooses among the weights or channels of layers, which must be plain ones then."""
    return isinstance(step.run, functools.partial) and bool({"granularity", "regulariser"} & step.run.keywords.keys())


def _check(step: Step, state: State) -> State:
    """Runs the `check` that a stage's file may define, with those of the stage's parameters that it names.

    Returns:
        the state for the checks of later stages: what `check` returns, where it returns one.
    """
    assert isinstance(step.run, functools.partial)
    if optimizer := step.run.keywords.get("optimizer"):
        try:
            optimizer([torch.nn.Parameter(torch.zeros(1))])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{step.name}.optimizer: {error}") from error
    if step.run.keywords.get("epochs"):
        _check_last_batch(state, step.name, int(step.run.keywords["batch_size"]))
    check = getattr(sys.modules[step.run.func.__module__], "check", None)
    if check is None:
        return state
    wanted = inspect.signature(check).parameters
    given = {key: value for key, value in step.run.keywords.items() if key in wanted}
    return check(state.evolve(stage=step.name), **given) or state


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
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"model={name} fails on images of {shape}: {type(error).__name__}: {reason}") from error
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"model={name} returns a {type(found).__name__}; it must return logits, a tensor")
    if found.dim() != 2 or len(found) != 1 or found.shape[1] < classes:
        raise ConfigError(
            f"model={name} returns {tuple(found.shape)} for one image; it must return (1, {classes}), a logit per class"
        )


def _check_last_batch(state: State, stage: str, batch_size: int) -> None:
    """Refuses a batch of a single image where the network cannot train on one, as batch norms of 1x1 maps.

    Raises:
        ConfigError: which key to change.
    """
    batches = state.data.train(batch_size, 0)
    if len(batches) == 0 or batches.size(len(batches) - 1) != 1:
        return
    try:
        with torch.no_grad():
            copy.deepcopy(state.model).train()(state.example_inputs())
    except ValueError as error:
        raise ConfigError(
            f"{stage}.batch_size={batch_size} leaves one image of {state.data.sizes['train']} for the last batch, on which "
            f"model={state.architecture.name} cannot train ({str(error).splitlines()[0]}); choose another"
        ) from error


def _check_order(steps: Sequence[Step]) -> None:
    """Refuses stages that would undo what an earlier one is there for.

    A stage's file says FINAL where its result would not survive another stage.

    Raises:
        ConfigError: names both.
    """
    final: Step | None = None
    for step in steps:
        assert isinstance(step.run, functools.partial)
        module = sys.modules[step.run.func.__module__]
        if getattr(module, "FINAL", False):
            final = step
        elif final:
            raise ConfigError(
                f"stages: {step.name} after {final.name} would lose the shared weights; put {final.name} after it "
                f"({final.name} fine-tunes the shared values itself: {final.name}.epochs)"
            )


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


def within(pipeline: Pipeline, interrupted: Callable[[], bool], world: World) -> Pipeline:
    """The pipeline among its processes, with a function that tells its stages when the user asked to stop."""
    return replace(pipeline, state=pipeline.state.evolve(interrupted=interrupted, world=world))


def run(pipeline: Pipeline, store: Store, folder: Path, *, latency: bool) -> list[Row]:
    """Runs the stages in order, leaving checkpoints and tables in `folder`, and returns the rows of results.csv.

    Raises:
        Interrupted: the user asked to stop; what is finished is kept, the running stage is resumable.
        TrainingError, StorageError: see there.
    """
    state, key = pipeline.state, pipeline.root_key
    table: list[Row] = []
    layers: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    steps = list(pipeline.steps)
    if pipeline.measured:
        steps.insert(0, Step(INITIAL, lambda state: state.evolve(outcome=Outcome()), "", dict.fromkeys(CHOICES)))
    dense: Mapping[str, Any] | None = None
    for step in steps:
        if state.world.any(state.interrupted()):
            raise Interrupted(f"stopped before {step.name}; the same command goes on there")
        if _prunes(step) and state.dense is None:
            state = state.evolve(dense=store.root / key)
        key = key_of(key, step.name, step.content)
        saved, state = _reuse_or_compute(step, state, key, store, latency)
        if not state.world.main:
            continue
        if state.dense is not None and dense is None:
            dense = _measured(state.dense)
            if not pipeline.trained and len(table) == 1 and table[0].stage == INITIAL:
                dense = {**dense, "acc1": None}
        facts = _measured(saved)
        if latency and facts["latency_ms_b1"] is None:  # stored by a run that did not measure it
            facts |= rows.latencies(state)
        table.append(rows.row(step.name, step.choices, facts, pipeline.labels, dense, key))
        layers += [{"stage": step.name, **layer} for layer in facts["layers"]]
        history += [{"stage": step.name, **epoch} for epoch in facts["history"]]
        state.console.history(step.name, facts["history"])
        artifacts.link_folder(saved, folder / step.name)
        _tables(folder, table, layers, history)
    return table


def _tables(folder: Path, table: list[Row], layers: list[dict[str, Any]], history: list[dict[str, Any]]) -> None:
    artifacts.write_results(folder / artifacts.RESULTS, table)
    artifacts.write_table(
        folder / artifacts.LAYERS,
        layers,
        list(dict.fromkeys(["stage", "layer", "kind", *(k for r in layers for k in r)])),
    )
    columns = dict.fromkeys(["stage", "epoch", "loss", "lr", "acc1", *(key for row in history for key in row)])
    artifacts.write_table(folder / artifacts.HISTORY, history, list(columns))


def _reuse_or_compute(step: Step, state: State, key: str, store: Store, latency: bool) -> tuple[Path, State]:
    """The folder of the step's result and the state after it. Of several processes rank 0 alone touches the store."""
    world, folder = state.world, store.root / key
    if world.share(store.find(key) is not None if world.main else None):
        log.info("%s: taken from the store (%s)", step.name, key)
        return folder, restore(folder, state)
    with store.lock(key, step.name) if world.main else nullcontext():
        if world.share(store.find(key) is not None if world.main else None):
            log.info("%s: another process has finished it (%s)", step.name, key)
            return folder, restore(folder, state)
        log.info("%s: starting (%s)", step.name, key)
        began = time.monotonic()
        torch.manual_seed(derive_seed(state.seed, step.name, *([world.rank] if world.rank else [])))
        before = shrinking.expanded(state) if _reads_weights(step) else state
        after = step.run(before.evolve(stage=step.name, slot=store.slot(key), outcome=Outcome()))
        seconds = time.monotonic() - began
        if world.main:
            facts = rows.measure_stage(after, seconds, latency)
            store.put(key, functools.partial(_write, after, facts))
            log.info("%s: done, acc1 %.2f on the test split", step.name, facts["acc1"])
        # Go on from what was written, as a run that finds it in the store does: both then continue with the same bits.
        return folder, restore(folder, after)


def _write(state: State, facts: Mapping[str, Any], folder: Path) -> None:
    """Fills the folder of a finished stage: a pruned network says in pruned.yaml how it descends from the dense one."""
    if state.masks or state.lineage:
        lineage = shrinking.composed(state.lineage) or Lineage()
        dense = None if state.dense is None else _measured(state.dense)["weights_sha256"]
        record = pruned.Record(state.architecture.node, lineage, state.data.num_classes, state.data.shape, dense)
        pruned.write(folder, state.model, record, state.masks)
    else:
        write_weights(state.model.state_dict(), folder / artifacts.WEIGHTS)
    for name, content in state.outcome.files.items():
        artifacts.write_file(folder / name, content)
    checkpoint = {
        "model": state.architecture.node,
        "model_name": state.architecture.name,
        "num_classes": state.data.num_classes,
        "in_shape": list(state.data.shape),
        "weights_sha256": state_sha256(state.model.state_dict()),
        "forms": {name: asdict(form) for name, form in state.forms.items() if name in state.masks},
        "measured": facts,
    }
    artifacts.write_json(folder / artifacts.CHECKPOINT, checkpoint)


def _measured(folder: Path) -> dict[str, Any]:
    checkpoint = json.loads((folder / artifacts.CHECKPOINT).read_text())
    return checkpoint["measured"] | {"weights_sha256": checkpoint["weights_sha256"]}
