"""The only loop over stages: takes from the store what is there, adds what is not, and writes the tables."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prune_cli.errors import Interrupted, TrainingError
from prune_cli.files import artifacts, pruned
from prune_cli.files.artifacts import Row
from prune_cli.files.checkpoint import read_checkpoint
from prune_cli.files.weights import write_weights
from prune_cli.pipeline import results, shrinking
from prune_cli.pipeline.code import changed
from prune_cli.pipeline.loading import restore
from prune_cli.pipeline.state import Outcome, State, derive_seed
from prune_cli.pipeline.step import CHOICES, INITIAL, Pipeline, Step
from prune_cli.pipeline.store import Store, key_of
from prune_cli.structure.lineage import Lineage
from prune_cli.tensors import not_finite, state_sha256

log = logging.getLogger(__name__)

SHOWN = 8  # digits of a key in a line for the user; all of them are in results.csv


def run(pipeline: Pipeline, store: Store, folder: Path, *, latency: bool) -> list[Row]:
    """Runs the stages in order, leaving checkpoints and tables in `folder`, and returns the rows of results.csv.

    Raises:
        Interrupted: the user asked to stop; what is finished is kept, the running stage is resumable.
        TrainingError, StorageError: see there.
    """
    state, key, meaning = pipeline.state, pipeline.root_key, pipeline.root_key
    table: list[Row] = []
    layers: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    labels, steps = dict(pipeline.labels), list(pipeline.steps)
    if pipeline.measured:
        as_it_is = Step(
            INITIAL, lambda state: state.evolve(outcome=Outcome()), "", dict.fromkeys(CHOICES), pipeline.code
        )
        steps.insert(0, as_it_is)
    dense: Mapping[str, Any] | None = None
    if state.world.main:
        store.refer(folder)
    for number, step in enumerate(steps, 1 if steps[0].name != INITIAL else 0):
        if state.world.any(state.interrupted()):
            raise Interrupted(f"stopped before {step.name}; the same command goes on there")
        if step.stage.removes and state.dense is None:
            state = state.evolve(dense=store.root / key, parent=state.architecture)
        key, meaning = key_of(key, step.name, step.content, step.code), key_of(meaning, step.name, step.content)
        state.console.stage(number, len(pipeline.steps))
        saved, state = _reuse_or_compute(step, state, key, meaning, store, latency)
        if not state.world.main:
            continue
        if state.dense is not None and dense is None:
            dense = _measured(state.dense)
            if not pipeline.trained and len(table) == 1 and table[0].stage == INITIAL:
                dense = {**dense, "acc1": None}
        facts = _measured(saved)
        if latency and facts["latency_ms_b1"] is None:  # stored by a run that did not measure it
            facts |= results.latencies(state)
        labels["model"] = step.choices.get("model") or labels["model"]
        table.append(results.row(step.name, step.choices, facts, labels, dense, key))
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


def _reuse_or_compute(
    step: Step, state: State, key: str, meaning: str, store: Store, latency: bool
) -> tuple[Path, State]:
    """The folder of the step's result and the state after it. Of several processes rank 0 alone touches the store.

    Args:
        meaning: what of the key stays when only our code changes.
    """
    world, folder = state.world, store.root / key
    if world.broadcast(store.find(key) is not None if world.main else None):
        log.info("%s: taken from the store (%s)", step.name, key[:SHOWN])
        return folder, restore(folder, _expected(step, state))
    with store.lock(key, step.name) if world.main else nullcontext():
        if world.broadcast(store.find(key) is not None if world.main else None):
            log.info("%s: another process has finished it (%s)", step.name, key[:SHOWN])
            return folder, restore(folder, _expected(step, state))
        if world.main and (earlier := store.code_of(meaning)) and (modules := changed(earlier, step.code)):
            log.warning("%s: computed again, as %s changed since the stored result", step.name, ", ".join(modules))
        log.info("%s: starting (%s)", step.name, key[:SHOWN])
        began = time.monotonic()
        torch.manual_seed(derive_seed(state.seed, step.name, *([world.rank] if world.rank else [])))
        before = shrinking.expanded(state) if step.stage.reads_weights else state
        constants = not_finite(dict(before.model.named_buffers()))  # as the masks of some attention layers
        after = step.run(before.evolve(stage=step.name, slot=store.slot(key), outcome=Outcome()))
        seconds = time.monotonic() - began
        _require_finite(after, step.name, constants)
        if world.main:
            facts = results.measure_stage(after, seconds, latency)
            _require_finite_loss(after, step.name, facts["loss"])
            store.put(key, functools.partial(_write, after, facts))
            store.note_code(meaning, key, step.code)
            log.info("%s: done, acc1 %.2f on the test split", step.name, facts["acc1"])
        # Go on from what was written, as a run that finds it in the store does: both then continue with the same bits.
        return folder, restore(folder, after)


def _expected(step: Step, state: State) -> State:
    """The state into which a step's result is read."""
    return state if step.stage.becomes is None else step.stage.becomes(state, step.parameters)


def _require_finite(state: State, stage: str, constants: Sequence[str]) -> None:
    """Refuses to store a network that a training has broken.

    Args:
        constants: buffers that were not finite when the stage began: they are meant so.

    Raises:
        TrainingError: names the first parameter or buffer that is not finite; nothing of the stage is kept.
    """
    broken = [name for name in not_finite(state.model.state_dict()) if name not in constants]
    if broken:
        _forget(state)
        raise TrainingError(
            f"{stage}: {broken[0]} has values that are not finite numbers ({len(broken)} tensors have); nothing of the stage "
            "is kept. A lower learning rate, a warm-up or gradient clipping usually helps"
        )


def _require_finite_loss(state: State, stage: str, loss: float) -> None:
    """Refuses to store a network whose weights are finite numbers, but too large to compute with.

    Raises:
        TrainingError: nothing of the stage is kept.
    """
    if not math.isfinite(loss):
        _forget(state)
        raise TrainingError(
            f"{stage}: the loss on the test split is {loss}; nothing of the stage is kept. A lower learning rate, a warm-up "
            "or gradient clipping usually helps"
        )


def _forget(state: State) -> None:
    if state.world.main:
        state.slot.clear()


def _write(state: State, facts: Mapping[str, Any], folder: Path) -> None:
    """Fills the folder of a finished stage: a pruned network says in pruned.yaml how it descends from the dense one."""
    if state.masks or state.lineage is not None:
        lineage = state.lineage or Lineage()
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
    checkpoint = read_checkpoint(folder)
    return {**checkpoint.measured, "weights_sha256": checkpoint.weights_sha256}
