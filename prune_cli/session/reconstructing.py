"""Layer by layer, new weights for the network of a stage that give the dense network's outputs again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from prune_cli.criteria.statistics import Calibration
from prune_cli.errors import ConfigError, Interrupted
from prune_cli.pipeline.loading import restore
from prune_cli.pipeline.state import State
from prune_cli.progress import track
from prune_cli.reconstruction import layers
from prune_cli.reconstruction.layers import Moments
from prune_cli.reconstruction.least_squares import refit
from prune_cli.structure.lineage import Lineage
from prune_cli.structure.prunable import owner

log = logging.getLogger(__name__)

SAVE_SECONDS = 30.0
WEIGHTS, MASKS = "weights/", "masks/"

Choose = Callable[[str, nn.Module, Moments], Tensor | None]
"""(weight's name, layer, moments) -> a new mask of it, or None to leave the one that it has."""


def check(state: State) -> None:
    """Refuses networks of which no layer can be fitted.

    Raises:
        ConfigError: says what would be right.
    """
    if not layers.in_order(state.model, state.example_inputs()):
        raise ConfigError(
            f"{state.stage}: the network runs no plain convolution (1-D, 2-D) or linear layer exactly once; leave the stage "
            "out (stages=[...])"
        )


def reconstruct_layers(
    state: State, calibration: Calibration, damping: float, *, choose: Choose | None = None
) -> dict[str, Tensor]:
    """Fits every layer, in the order in which they run, in place; each sees what the fitted ones before it make.

    Args:
        calibration: training images that are looked at.
        damping: see `least_squares.refit`.
        choose: chooses masks on the way.

    Returns:
        All masks that hold afterwards.

    Raises:
        Interrupted: the user asked to stop; the same stage goes on there.
    """
    dense = _dense(state)
    rows = _rows(state, dense)
    masks, done = _resumed(state)
    names = [name for name in layers.in_order(state.model, state.example_inputs()) if name in rows]
    saved = time.monotonic()
    for name in track(names[done:], f"{state.stage}: layers"):
        module = state.model.get_submodule(owner(name))
        moments = _measured(state, dense.model, name, calibration, rows[name])
        if choose is not None and (chosen := choose(name, module, moments)) is not None:
            masks[name] = chosen
        keep = layers.keep_rows(module, masks.get(name), masks.get(name.removesuffix("weight") + "bias"))
        _fit(state, module, moments, keep, damping)
        done += 1
        stopping = state.world.any(state.interrupted())
        if stopping or state.world.any(time.monotonic() - saved > SAVE_SECONDS):
            tensors = {WEIGHTS + key: value for key, value in state.model.state_dict().items()}
            state.keep({**tensors, **{MASKS + key: value for key, value in masks.items()}}, {"done": done})
            saved = time.monotonic()
        if stopping:
            raise Interrupted(f"stopped in {state.stage} after {done} layers; the same command goes on there")
    return masks


def _dense(state: State) -> State:
    """The network before the first pruning stage; a copy of this one where this is the first."""
    if state.dense is None:
        raise ConfigError(f"{state.stage}: there is no dense network before it")
    return restore(state.dense, state)


def _resumed(state: State) -> tuple[dict[str, Tensor], int]:
    found = state.unfinished()
    if found is None:
        return dict(state.masks), 0
    tensors, numbers = found
    state.model.load_state_dict({key[len(WEIGHTS) :]: v for key, v in tensors.items() if key.startswith(WEIGHTS)})
    masks = {key[len(MASKS) :]: v.to(state.device) for key, v in tensors.items() if key.startswith(MASKS)}
    log.info("%s: going on behind layer %d", state.stage, numbers["done"])
    return masks, int(numbers["done"])


def _measured(state: State, dense: nn.Module, name: str, calibration: Calibration, rows: Tensor | None) -> Moments:
    world = state.world
    whole = state.data.calibration(calibration.images, calibration.batch_size)
    shared = world.size > 1 and len(whole) >= world.size
    batches = state.data.calibration(calibration.images, calibration.batch_size, shard=world.shard) if shared else whole
    return layers.measured(state.model, dense, name, lambda: batches, rows, reduce=world.add_up if shared else None)


def _fit(state: State, module: nn.Module, moments: Moments, keep: Tensor, damping: float) -> None:
    weights = layers.as_rows(module)
    fitted = {
        str(group): refit(weights[group], keep[group], moments.gram[group], moments.cross[group], damping=damping)
        for group in range(len(weights))
    }
    fitted = state.world.broadcast_tensors(fitted)  # the same bits on every rank
    layers.set_rows(module, torch.stack([fitted[str(group)] for group in range(len(weights))]).to(weights.device))


def _rows(state: State, dense: State) -> dict[str, Tensor | None]:
    """Which outputs of the dense network's layer are those of the layer now, by the weight's name; None = all.

    Layers that the dense network does not have, and those whose outputs it has not all of, are absent.
    """
    found: dict[str, Tensor | None] = {}
    before = dict(dense.model.named_parameters())
    for name, parameter in state.model.named_parameters():
        if name not in before:
            continue
        mine, theirs = (_kept(one.lineage, name) for one in (state, dense))
        if mine == theirs:
            if len(parameter) == len(before[name]):
                found[name] = None
            continue
        places = range(len(before[name])) if theirs is None else theirs
        index = {place: number for number, place in enumerate(places)}
        if mine is not None and set(mine) <= set(index) and len(mine) == len(parameter):
            found[name] = torch.tensor([index[place] for place in mine])
    return found


def _kept(lineage: Lineage | None, name: str) -> tuple[int, ...] | None:
    axes: Mapping[int, tuple[int, ...]] = {} if lineage is None else lineage.kept.get(name, {})
    return axes.get(0)
