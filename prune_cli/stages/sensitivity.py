"""How much accuracy each layer's pruning costs alone, for every ratio and criterion; the network stays as it is."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import torch
import yaml
from pydantic import Field
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Calibration
from prune_cli.errors import ConfigError, Interrupted
from prune_cli.files import artifacts
from prune_cli.files.lines import Lines
from prune_cli.granularities.units import Context, FindPlan
from prune_cli.measure import accuracy
from prune_cli.pipeline.stage import Stage
from prune_cli.pipeline.state import Outcome, State
from prune_cli.progress import track
from prune_cli.selection import requirements
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import names_of, select
from prune_cli.selection.targets import Rule
from prune_cli.session import learning
from prune_cli.session.measuring import statistics_of
from prune_cli.stages.sensitivity_plot import Point, curves
from prune_cli.structure import follow
from prune_cli.structure.prunable import owner, target

log = logging.getLogger(__name__)

Grid = Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]

TABLE = "sensitivity.csv"
PLOT = "sensitivity.svg"
POINTS = "points"  # beside the checkpoints of unfinished stages


@dataclass(frozen=True)
class Candidate:
    """One layer pruned at one ratio. members: the weights that the layer stands for in a ratio file, masks: of all
    parameters that its pruning touches."""

    layer: str
    members: tuple[str, ...]
    ratio: float
    ratio_realised: float
    masks: Mapping[str, Tensor]


def check(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    compare: Mapping[str, Criterion],
    ratios: Grid,
    split: str,
    plot: bool,
) -> None:
    """Refuses criteria that the units cannot use, a split that is not there and a plot that cannot be drawn.

    Raises:
        ConfigError: says why and what would be legal.
    """
    if not state.data.sizes.get(split):
        raise ConfigError(
            f"{state.stage}.split={split}, but dataset.val=0 leaves no such images; set dataset.val to a fraction, or "
            f"{state.stage}.split=test"
        )
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{state.stage}.plot=true needs matplotlib: pip install 'prune-cli[plot]', or plot=false")
    for one in _named(criterion, compare).values():
        _check_grid(state, granularity, one, sorted(set(ratios)))
        request = _everywhere(granularity, state.model, min(ratios))
        requirements.check(one, request, state.model, state.data, state.example_inputs())


def _check_grid(state: State, granularity: Granularity, criterion: Criterion, ratios: Sequence[float]) -> None:
    """Refuses a grid of which any ratio would be refused by the prune stage.

    Raises:
        ConfigError: as the prune stage says it where no ratio would do; else which are in the way.
    """
    refused: dict[float, ConfigError] = {}
    for ratio in ratios:
        try:
            _everywhere(granularity, state.model, ratio).check(state.model, criterion)
        except ConfigError as error:
            refused[ratio] = error
    if len(set(map(str, refused.values()))) == 1 and len(refused) == len(ratios):
        raise next(iter(refused.values()))
    if refused:
        which = ", ".join(f"{ratio:g}" for ratio in list(refused)[:6]) + (" ..." if len(refused) > 6 else "")
        raise ConfigError(f"{state.stage}.ratios: {which} cannot be pruned: {next(iter(refused.values()))}")


WHOLE = Candidate("", (), 0.0, 0.0, {})
"""The network as it came."""


@Stage(check=check, reads_weights=True)
def sensitivity(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    compare: Mapping[str, Criterion],
    ratios: Grid,
    calibration: Calibration,
    split: Literal["val", "test"] = "val",
    drop: Annotated[float, Field(gt=0)] = 0.1,
    plot: bool = True,
) -> State:
    """Evaluates every layer at every ratio alone, by masks that are taken off again (Li et al., arXiv:1608.08710,
    section 3.2), and leaves a table, a plot and per criterion a ratio file.

    The ratio of a layer in the file is the largest of the grid that is reached from 0 upwards while the accuracy
    lost stays below `drop` (classifier-pruner). Several processes share the points out; each is written down as soon
    as it is there, so that a stopped stage goes on at the layer and ratio where it was.

    Args:
        compare: further criteria by name.
        ratios: fractions of a layer's units to remove.
        calibration: images for criteria that need them.
        split: images to evaluate on.
        drop: percentage points.
        plot: whether to draw the curves.
    """
    state.model.eval()
    named, grid = _named(criterion, compare), sorted(set(ratios))
    found = Lines(state.slot.folder / POINTS)
    points = [Point(**line) for line in state.world.broadcast(found.read() if state.world.main else None)]
    known = {(point.criterion, point.layer, point.ratio) for point in points}
    members: dict[str, tuple[str, ...]] = {}

    def unknown() -> Iterator[tuple[str, Candidate]]:
        yield from [] if ("", WHOLE.layer, WHOLE.ratio) in known else [("", WHOLE)]
        for name, one in named.items():
            for candidate in candidates(granularity, one, state, grid, calibration):
                members[candidate.layer] = candidate.members
                if (name, candidate.layer, candidate.ratio) not in known:
                    yield name, candidate

    missing = unknown()
    turns = iter(lambda: list(itertools.islice(missing, state.world.size)), [])
    for turn in track(turns, f"{state.stage}: points"):
        for point in _evaluated(state, turn, split):
            points.append(point)
            log.debug("%s: %s without %.2f: %.2f", state.stage, point.layer, point.ratio_realised, point.acc1)
            if state.world.main:
                found.append(asdict(point))
        if state.world.any(state.interrupted()):
            raise Interrupted(f"stopped in {state.stage} after {len(points)} points; the same command goes on there")
    whole = next(point for point in points if point.layer == WHOLE.layer)
    points = [point for point in points if point is not whole]
    points += [replace(whole, layer=layer, criterion=name) for name in named for layer in members]
    points = _ordered(points, list(members), list(named))
    files = {TABLE: artifacts.table(Point, points)}
    files |= {f"ratios_{name}.yaml": ratio_file(points, name, members, drop) for name in named}
    if plot:
        files[PLOT] = curves(points, f"{state.architecture.name}, {state.data.name} {split}")
    return state.evolve(outcome=Outcome(files=files))


def _evaluated(state: State, turn: Sequence[tuple[str, Candidate]], split: str) -> list[Point]:
    """The points of some candidates, at most as many as there are ranks: each rank evaluates one, and all get all."""
    results = torch.zeros(state.world.size, 2, dtype=torch.float64)
    if state.world.rank < len(turn):
        with zeroed(state.model, turn[state.world.rank][1].masks):
            measured = accuracy.accuracy(state.model, state.data.evaluation(split, learning.EVALUATION_BATCH))
        results[state.world.rank] = torch.tensor([measured.acc1, measured.loss], dtype=torch.float64)
    return [
        Point(candidate.layer, name, candidate.ratio, candidate.ratio_realised, acc1, loss)
        for (name, candidate), (acc1, loss) in zip(turn, state.world.total(results).tolist(), strict=False)
    ]


def _named(criterion: Criterion, compare: Mapping[str, Criterion]) -> dict[str, Criterion]:
    """The run's criterion under its function's name, then the others."""
    score = getattr(criterion.score, "func", criterion.score)
    return {getattr(score, "__name__", type(score).__name__): criterion} | dict(compare)


def candidates(
    granularity: Granularity, criterion: Criterion, state: State, ratios: Sequence[float], calibration: Calibration
) -> Iterator[Candidate]:
    """Every layer (or coupled set of layers) at every ratio: the masks that a prune stage makes of it alone, on the network
    as it is now."""
    statistics = statistics_of(state, criterion, list(granularity.ratios(state.model)), calibration)
    plan = functools.cache(lambda: follow.analyse(state.model, state.example_inputs()))
    for ratio in ratios:
        for layer, members in _layers(_everywhere(granularity, state.model, ratio), state, plan).items():
            selection = select(
                _only(granularity, members, ratio),
                criterion,
                state.model,
                state.example_inputs(),
                masked=state.masks,
                statistics=statistics,
                seed=state.stage_seed % 2**62,
                plan=plan,
                quiet=True,
            )
            both = masking.joined(state.masks, selection.masks)
            masks = granularity.complete(state.model, state.example_inputs(), both, plan)
            yield Candidate(layer, members, ratio, selection.removed / max(selection.units, 1), masks)


def _layers(granularity: Granularity, state: State, plan: FindPlan) -> dict[str, tuple[str, ...]]:
    """The sets of weights that can only be asked for together, by the name of their first group of units."""
    asked = granularity.ratios(state.model)
    blank = {name: torch.zeros(()).expand(target(state.model, name).weight.shape) for name in asked}
    context = Context(
        state.model, state.example_inputs(), blank, asked, state.masks, granularity.dependency, find_plan=plan
    )
    groups = granularity.units.groups(context)
    sets: dict[tuple[str, ...], str] = {}
    for name, group in zip(names_of(groups), groups, strict=True):
        members = tuple(f"{layer}.weight" if layer else "weight" for layer in group.layers) or (group.name,)
        sets.setdefault(members, name)
    return {name: members for members, name in sets.items()}


def _everywhere(granularity: Granularity, model: nn.Module, ratio: float) -> Granularity:
    """The granularity with one ratio for every layer that it asks for."""
    return _only(granularity, tuple(granularity.ratios(model)), ratio)


def _only(granularity: Granularity, members: Sequence[str], ratio: float) -> Granularity:
    """The granularity with one ratio for some weights, each layer by itself."""
    return replace(
        granularity,
        ratio=ratio,
        rules=(Rule(names=tuple(owner(name) for name in members)),),
        ratio_file=None,
        scope="layer" if granularity.scope == "global" else granularity.scope,
        normalize=None,
        budget=None,
    )


@contextmanager
def zeroed(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with masked entries at zero inside the block, and with exactly its own bits after it."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in masks}
    try:
        masking.apply(model, masks)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def _ordered(points: Sequence[Point], layers: list[str], criteria: list[str]) -> list[Point]:
    return sorted(points, key=lambda p: (criteria.index(p.criterion), layers.index(p.layer), p.ratio))


def safe_ratio(points: Sequence[Point], drop: float) -> float:
    """The largest ratio reached from 0 upwards before the accuracy lost is first `drop` percentage points or more.

    Args:
        points: one layer and criterion, by rising ratio, the first at 0.
    """
    safe = 0.0
    for point in points:
        if points[0].acc1 - point.acc1 >= drop:
            break
        safe = point.ratio
    return safe


def ratio_file(points: Sequence[Point], criterion: str, members: Mapping[str, tuple[str, ...]], drop: float) -> str:
    """YAML for `granularity.ratio_file`; a weight that belongs to several groups gets the least of their ratios."""
    ratios: dict[str, float] = {}
    for layer, names in members.items():
        safe = safe_ratio([p for p in points if (p.layer, p.criterion) == (layer, criterion)], drop)
        for name in names:
            ratios[name] = min(safe, ratios.get(name, safe))
    head = (
        f"# Fractions removed per weight by {criterion}: each layer alone loses less than {drop:g} points of accuracy\n"
    )
    return head + yaml.safe_dump({"prune_ratio": ratios}, sort_keys=False)
