"""Channel permutation through a whole network: a better order for N:M pruning, the same function.

Channels that depend on each other (`channels.analyse`) move together on every axis that carries them, so the network
computes what it did. Whoever reads them sees its input channels in a new order, and N:M groups other weights.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.granularities.n_m import input_axis
from prune_cli.masks import Masks
from prune_cli.permutation.search import kept, row_bound, search
from prune_cli.structure.modes import evaluating
from prune_cli.structure.plan import Plan

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest change of the outputs, relative to their largest value, that is rounding."""

Moves = dict[str, dict[int, Tensor]]
"""Parameter or buffer name -> axis -> old position of what is at each position now."""


@dataclass(frozen=True)
class Layer:
    """Magnitude that N:M keeps of one weight, the sum of |w|; a line of permutation.csv.

    Attributes:
        before: in the order that the network had.
        after: in the new one.
        bound: if every row could choose freely.
    """

    name: str
    m: int
    n: int
    before: float
    after: float
    bound: float

    @property
    def efficacy(self) -> float:
        """Percent of the way from the old order to the bound."""
        return 100 * (self.after - self.before) / (self.bound - self.before) if self.bound > self.before else 0.0


@dataclass(frozen=True)
class Permuted:
    """What a permutation did: kept magnitudes by layer, and where everything went."""

    layers: tuple[Layer, ...]
    moves: Moves


@dataclass(frozen=True)
class _Class:
    """Units that occur on the same axes equally often, so they may change places.

    Attributes:
        units: ids in the order of their first position.
        places: (name, axis) -> (units, occurrences) positions, in the order of `units`.
        readers: weights that N:M prunes along an axis of these units, one position per unit: name -> axis.
    """

    units: np.ndarray
    places: Mapping[tuple[str, int], np.ndarray]
    readers: Mapping[str, int]


def permute(
    model: nn.Module,
    plan: Plan,
    patterns: Mapping[str, tuple[int, int]],
    *,
    window: int = 8,
    escapes: int = 20,
    seed: int = 0,
) -> Permuted:
    """Reorders the channels of a network in place, so that N:M pruning keeps more magnitude.

    All readers of the same channels are searched together, with their rows stacked. An order is taken only if the
    layers that it touches keep more in total, and, where a norm looks across channels (groups of a group norm), only if
    the function stays.

    Args:
        model: the network of the plan.
        plan: from `channels.analyse`.
        patterns: (m, n) by parameter name: the weights that N:M will prune; others do not count.
        window: see `column_search.search`.
        escapes: see `column_search.search`.
        seed: of the search.

    Raises:
        SurgeryError: the outputs changed, which the plan excludes; the model is as it was.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    before = {name: kept(_matrix(model, name), *pattern) for name, pattern in patterns.items()}
    moves: Moves = {}
    found = [c for family in plan.families for c in _classes(model, plan, family.units, patterns)]
    reference = _outputs(model, plan)
    for number, group in enumerate(found):
        order = _search(model, group, patterns, window, escapes, seed + number)
        if order is None:
            continue
        step = _moves(tensors, group, order)
        old = sum(kept(_matrix(model, name), *patterns[name]) for name in _touched(group, patterns))
        _apply(tensors, step)
        new = sum(kept(_matrix(model, name), *patterns[name]) for name in _touched(group, patterns))
        across = any(int(unit) in plan.norms for unit in group.units)
        if new <= old or (across and not _same(reference, _outputs(model, plan))):
            _apply(tensors, _inverse(step))
            continue
        moves = _then(moves, step)
    if not _same(reference, _outputs(model, plan)):
        _apply(tensors, _inverse(moves))
        raise SurgeryError(
            "reordering channels changed the outputs; the network is left as it was, without permutation"
        )
    layers = []
    for name, (m, n) in patterns.items():
        matrix = _matrix(model, name)
        layers.append(Layer(name, m, n, before[name], kept(matrix, m, n), row_bound(matrix, m, n)))
        log.debug("%s m%dn%d: kept magnitude %.6g -> %.6g", name, m, n, before[name], layers[-1].after)
    return Permuted(tuple(layers), moves)


def permute_masks(masks: Masks, moves: Moves) -> dict[str, Tensor]:
    """Masks of the old order in the new one."""
    result = {}
    for name, mask in masks.items():
        for axis, index in moves.get(name, {}).items():
            if mask.shape[axis] > 1:
                mask = mask.index_select(axis, index.to(mask.device))
        result[name] = mask
    return result


def _matrix(model: nn.Module, name: str) -> Tensor:
    """Rows of everything else by input channels."""
    weight = model.get_parameter(name).detach()
    return weight.movedim(input_axis(model, name), -1).flatten(0, -2)


def _classes(model: nn.Module, plan: Plan, units: np.ndarray, patterns: Mapping[str, tuple[int, int]]) -> list[_Class]:
    """Parts a family into classes whose units occur on the same axes equally often, and that something reads."""
    low, high = int(units.min()), int(units.max()) + 1  # the units of a family are one range
    counts: dict[tuple[str, int], np.ndarray] = {}
    for name, axes in plan.axes.items():
        for axis, ids in axes.items():
            inside = ids[(ids >= low) & (ids < high)]
            if len(inside):
                counts[name, axis] = np.bincount(inside - low, minlength=high - low)
    signatures = np.stack(list(counts.values()), axis=1)[units - low]
    found = []
    for signature in np.unique(signatures, axis=0):
        members = units[(signatures == signature).all(axis=1)]
        places = {
            key: _positions(plan.axes[key[0]][key[1]], members, int(times))
            for key, times in zip(counts, signature, strict=True)
            if times
        }
        readers = {
            name: axis
            for (name, axis), where in places.items()
            if name in patterns and axis == input_axis(model, name) and where.shape[1] == 1
        }
        if len(members) > 1 and readers:
            found.append(_Class(members, places, readers))
    return found


def _positions(ids: np.ndarray, members: np.ndarray, times: int) -> np.ndarray:
    """(members, times) positions of units on an axis, increasing for each unit."""
    where = np.flatnonzero(np.isin(ids, members))
    order = np.argsort(ids[where], kind="stable")
    by_unit = where[order].reshape(len(members), times)
    return by_unit[np.argsort(np.argsort(members, kind="stable"), kind="stable")]


def _search(
    model: nn.Module,
    group: _Class,
    patterns: Mapping[str, tuple[int, int]],
    window: int,
    escapes: int,
    seed: int,
) -> np.ndarray | None:
    """Which unit comes to the place of each unit (indices into the class), or None where nothing is gained."""
    sizes: Counter[tuple[int, int]] = Counter()
    for name in group.readers:
        sizes[patterns[name]] += model.get_parameter(name).numel()
    (m, n), _ = sizes.most_common(1)[0]  # readers with other patterns count only in the check
    chosen = [name for name in group.readers if patterns[name] == (m, n)]
    # Units in the order in which the first reader has them: consecutive ones share its groups.
    first = group.places[chosen[0], group.readers[chosen[0]]][:, 0]
    slots = np.argsort(first, kind="stable")
    stacked = []
    for name in chosen:
        columns = torch.from_numpy(group.places[name, group.readers[name]][slots, 0])
        matrix = _matrix(model, name)
        stacked.append(matrix[:, columns.to(matrix.device)])
    result = search(torch.cat(stacked), m, n, window=window, escapes=escapes, seed=seed)
    if result.kept <= result.identity:
        return None
    order = np.empty(len(slots), dtype=np.int64)
    order[slots] = slots[result.order.cpu().numpy()]
    return order


def _moves(tensors: Mapping[str, Tensor], group: _Class, order: np.ndarray) -> Moves:
    moves: Moves = {}
    for (name, axis), where in group.places.items():
        index = torch.arange(tensors[name].shape[axis])
        index[torch.from_numpy(where.reshape(-1))] = torch.from_numpy(where[order].reshape(-1))
        moves.setdefault(name, {})[axis] = index
    return moves


def _touched(group: _Class, patterns: Mapping[str, tuple[int, int]]) -> list[str]:
    return sorted({name for name, _ in group.places if name in patterns})


@torch.no_grad()
def _apply(tensors: Mapping[str, Tensor], moves: Moves) -> None:
    done: set[int] = set()
    for name, axes in moves.items():
        tensor = tensors[name]
        if id(tensor) not in done:  # tied names share one tensor
            done.add(id(tensor))
            for axis, index in axes.items():
                tensor.copy_(tensor.index_select(axis, index.to(tensor.device)))


def _inverse(moves: Moves) -> Moves:
    return {name: {axis: torch.argsort(index) for axis, index in axes.items()} for name, axes in moves.items()}


def _then(first: Moves, second: Moves) -> Moves:
    result = {name: dict(axes) for name, axes in first.items()}
    for name, axes in second.items():
        mine = result.setdefault(name, {})
        for axis, index in axes.items():
            mine[axis] = mine[axis][index] if axis in mine else index
    return result


@torch.no_grad()
def _outputs(model: nn.Module, plan: Plan) -> list[Tensor]:
    """What the network gives for random inputs like the example's."""
    generator = torch.Generator().manual_seed(0)

    def random(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    example = plan.example
    with evaluating(model):
        if isinstance(example, Mapping):
            output = model(**{key: random(value) for key, value in example.items()})
        else:
            output = model(*map(random, example if isinstance(example, tuple) else (example,)))
    found: list[Tensor] = []

    def collect(value: object) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            for key in value:
                collect(value[key])
        elif isinstance(value, (tuple, list)):
            for item in value:
                collect(item)

    collect(output)
    return found


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(
        float((a - b).abs().max()) <= TOLERANCE * max(float(a.abs().max()), 1e-30)
        for a, b in zip(first, second, strict=True)
        if a.is_floating_point() and a.numel()
    )
