"""From stage folders and model nodes back to networks: the way in for everything that a run, or a user, left on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune_cli.config.nodes import TRUSTED, locate, parameters_of, resolve
from prune_cli.data.dataset import Dataset
from prune_cli.errors import ConfigError, PruneError, first_line
from prune_cli.files import artifacts, builders, pruned
from prune_cli.files.checkpoint import read_checkpoint, require_whole
from prune_cli.files.weights import extent_of, load_weights
from prune_cli.measure.storage import MaskFormat
from prune_cli.pipeline.state import Architecture, State, Teacher, derive_seed
from prune_cli.structure.lineage import Lineage
from prune_cli.structure.rebuild import rebuild
from prune_cli.training.distributed import World


def build_architecture(node: Mapping[str, Any], data: Dataset, name: str, seed: int) -> Architecture:
    """How to build the network of a `model` node for a dataset's classes and image shape.

    A builder is given `num_classes` and `in_shape` where it has such parameters. Fresh weights are drawn from the
    run's seed.

    Raises:
        ConfigError: unknown or ill-typed keys.
    """
    facts = {"num_classes": data.num_classes, "in_shape": tuple(data.shape)}
    content = {key: value for key, value in node.items() if key != "weights"}
    parameters = parameters_of(locate(str(node.get("_target_")), "model"), "model")
    content |= {key: value for key, value in facts.items() if key in parameters and key not in content}

    def make(purpose: str = "model") -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, purpose))
            try:
                model = resolve(content, "model")
            except PruneError:
                raise
            except Exception as error:  # a builder of the user's own can raise anything
                if str(node["_target_"]).startswith(TRUSTED):
                    raise
                reason = first_line(error)
                raise ConfigError(f"model: {node['_target_']} raised {type(error).__name__}: {reason}") from error
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model._target_: {node['_target_']} made a {type(model).__name__}, not a torch module")
        return model

    return Architecture(make, json.loads(json.dumps(content)), name)


def restore(folder: Path, state: State) -> State:
    """The state after a stage that was finished earlier, from its folder; rank 0 reads it for all."""
    world, node, model, forms = state.world, None, None, {}
    lineage: Lineage | None = None
    masks: Mapping[str, Tensor] = {}
    if world.main:
        stored = read_checkpoint(folder)
        node, forms = dict(stored.model), dict(stored.forms)
        model, masks = load_model(folder, _architecture(node, state, folder).build), pruned.read_masks(folder)
        lineage = _lineage(folder)
    architecture, lineage = _architecture(world.broadcast(node), state), _same_lineage(world, lineage)
    model = _shared(state, model, architecture, lineage)
    masks = {name: mask.to(state.device) for name, mask in world.broadcast_tensors(masks).items()}
    formats = {name: MaskFormat(**form) for name, form in world.broadcast(forms).items()}
    tags = world.broadcast(_tags(folder) if world.main else None)
    remembered = {**state.remembered, **{tag: folder / artifacts.remembered(tag) for tag in tags}}
    return state.evolve(
        model=model, architecture=architecture, masks=masks, forms=formats, lineage=lineage, remembered=remembered
    )


def _shared(state: State, model: nn.Module | None, architecture: Architecture, lineage: Lineage | None) -> nn.Module:
    """Rank 0's network on every rank, on the run's device; the others pass None and build it themselves."""
    if state.world.size > 1:
        weights = state.world.broadcast_tensors(model.state_dict() if model is not None else None)
        if model is None:
            model = architecture.build()
            model = rebuild(model, lineage) if lineage else model
            model.load_state_dict(weights)
    assert model is not None
    return model.to(state.device).eval()


def _tags(folder: Path) -> list[str]:
    """Of the snapshots that a stage left in its folder."""
    before, after = artifacts.remembered("*").split("*")
    names = sorted(path.name for path in folder.glob(artifacts.remembered("*")))
    return [name.removeprefix(before).removesuffix(after) for name in names]


def _architecture(node: Mapping[str, Any], state: State, folder: Path | None = None) -> Architecture:
    """One of the run's own architectures where the node is its, else the one that a cfg or a teacher has.

    Args:
        folder: what the node was read from; None where that was on another rank, which has looked at it.

    Raises:
        CheckpointError: the node names code outside this package, or a network that is too large for the folder's files.
    """
    for own in (state.architecture, state.parent):
        if own is not None and node == own.node:
            return own
    builders.require_ours(node, "the stage folder")
    found = build_architecture(node, state.data, state.architecture.name, state.seed)
    if folder is None:
        return found
    extent = extent_of(folder / artifacts.WEIGHTS)
    builders.require_fitting(node, state.data.num_classes, state.data.shape, extent, str(folder))
    return Architecture(builders.guarded(found.build, str(folder)), found.node, found.name)


def _same_lineage(world: World, lineage: Lineage | None) -> Lineage | None:
    """Rank 0's lineage on every rank."""
    if world.size == 1:
        return lineage
    data = world.broadcast(lineage.to_dict() if lineage else None)
    return Lineage.from_dict(data) if data else None


def _lineage(folder: Path) -> Lineage | None:
    """What surgery did to the network of a stage folder, if anything."""
    if not (folder / artifacts.PRUNED).is_file():
        return None
    return pruned.read(folder).record.lineage or None


def load_model(folder: Path, build: Callable[[], nn.Module]) -> nn.Module:
    """The network of a stage folder: the dense architecture, made smaller as recorded, with the stored weights."""
    if (folder / artifacts.PRUNED).is_file():
        return pruned.load(folder, build())
    model = build()
    load_weights(model, folder / artifacts.WEIGHTS)
    return model.eval()


def load_teacher(state: State, teacher: Literal["dense"] | Path) -> Teacher:
    """A frozen teacher, which is read once, however often it is asked for.

    Raises:
        CheckpointError: the path is no stage folder, and does not hold weights of this run's dense architecture.
    """
    path = state.dense if teacher == "dense" else teacher
    assert path is not None, "checked by the stage before anything was trained"
    world = state.world
    key = world.broadcast(json.dumps([_stamps(path), state.architecture.node]) if world.main else None)
    if world.any(key not in state.teachers):
        state.teachers[key] = _read_teacher(state, path, ours=teacher == "dense")
    return state.teachers[key]


def _stamps(path: Path) -> list[Any]:
    """What changes when somebody writes another teacher to the same place."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [(file.name, file.stat()) for file in files if file.is_file()]
    except OSError:  # reading it says why
        found = []
    return [str(path.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in found)]


def _read_teacher(state: State, path: Path, *, ours: bool) -> Teacher:
    """Reads a teacher on rank 0, for all; `ours`: the store has just looked at its checksums."""
    world, node, model = state.world, None, None
    lineage: Lineage | None = None
    if world.main and path.is_dir():
        node = dict((read_checkpoint if ours else require_whole)(path).model)
        model, lineage = load_model(path, _architecture(node, state, path).build), _lineage(path)
    elif world.main:
        node, model = dict(state.architecture.node), state.architecture.build()
        load_weights(model, path)
    architecture, lineage = _architecture(world.broadcast(node), state), _same_lineage(world, lineage)
    model = _shared(state, model, architecture, lineage).requires_grad_(False)
    return Teacher(model, architecture.node, lineage)
