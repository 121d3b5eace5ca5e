"""Which options go together: every stage asked for every combination of the options it uses, before any training.

The table is what `prune run` would say: the checks of `pipeline.build`, on one network and one dataset that are built
once. An option is asked with the keys of its own file, unless the command line sets them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_cli.config import option_files
from prune_cli.config.compose import compose
from prune_cli.config.locations import options
from prune_cli.console import Console
from prune_cli.errors import ConfigError, PruneError, nearest
from prune_cli.pipeline.build import check_steps, first_state, resolve_steps
from prune_cli.pipeline.store import Store, default_root

AXES = ("criterion", "granularity", "schedule", "regulariser")
"""The groups whose options can exclude each other."""

NETWORK = ("model=resnet20", "model.depth=8", "model.widths=[4,8,8]", "dataset=fake", "device=cpu")
"""What is asked where nothing else is named: norms behind every convolution, shortcuts, a linear layer."""

STAGE = "stage"
ANY = "any"
"""The row, or column, of a stage that does not use the axis."""


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        stages: the stages that were asked, in order.
        options: axis -> option, for the axes that the stages use.
        refusal: why not, in one line; None where it is legal.
    """

    stages: tuple[str, ...]
    options: Mapping[str, str]
    refusal: str | None

    @property
    def where(self) -> str:
        """The stages as a recipe lists them."""
        return ",".join(self.stages)


def table(arguments: Sequence[str] = ()) -> list[Cell]:
    """Asks for every combination, stage by stage.

    Args:
        arguments: `AXIS=NAME[,NAME...]` or `stage=NAME[,NAME...]` keeps those only; what else `prune run` takes is set: a
            recipe, a model, a dataset, or a key of an option, as `schedule.start=1`, for every option that has it.

    Raises:
        ConfigError: an option or key that does not exist.
        DataError, CheckpointError: the network or the dataset cannot be had.
    """
    kept, overrides = _kept(arguments)
    config, choices = _composed(kept, overrides)
    state = first_state(config, choices, Console(), Store(default_root()))
    narrowed = {axis for axis in AXES if _narrowed(kept, axis)}
    cells = []
    for stages, axes in _stages(config):
        if narrowed - set(axes) or not set(stages) & set(kept[STAGE]):
            continue
        for names in itertools.product(*(kept[axis] for axis in axes)):
            picked = dict(zip(axes, names, strict=True))
            nodes = {axis: config["table"][axis][name] for axis, name in picked.items()}
            asked = {stage: config[stage] | {k: v for k, v in nodes.items() if k in config[stage]} for stage in stages}
            refusal = None
            try:
                check_steps(resolve_steps(stages, config | asked, choices | picked), state)
            except PruneError as error:
                refusal = " ".join(str(error).split())
            cells.append(Cell(stages, picked, refusal))
    if not cells:
        raise ConfigError(f"no stage among {', '.join(kept[STAGE])} uses {' and '.join(narrowed) or ', '.join(AXES)}")
    return cells


def _kept(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The options to ask for, by axis and for the stages, and the arguments that are not about which."""
    kept, overrides = {group: list(options(group)) for group in (*AXES, STAGE)}, []
    for argument in arguments:
        group, equals, names = argument.partition("=")
        if group not in kept or not equals:
            overrides.append(argument)
            continue
        for name in names.split(","):
            if name not in options(group):
                raise ConfigError(f"{group}={name}: there is no such option{nearest(name, options(group))}")
        kept[group] = names.split(",")
    return kept, overrides


def _composed(kept: Mapping[str, Sequence[str]], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """A config that holds every option to ask for under `table.AXIS.NAME`, and what is chosen in each group."""
    keys, rest = [], []
    for override in overrides:
        axis, _, key = override.partition(".")
        names = (
            [name for name in kept[axis] if _top(key) in option_files.keys(f"{axis}/{name}")] if axis in AXES else []
        )
        keys += [(axis, name, key) for name in names]
        rest += [] if names else [override]
    if not any(override.startswith(("recipe=", "model=", "dataset=")) for override in rest):
        rest = [*NETWORK, *rest]
    choices = [f"{axis}={kept[axis][0]}" for axis in AXES if _narrowed(kept, axis)]
    choices += [f"stage@{name}={name}" for name in kept[STAGE]]
    added = [f"+{axis}@table.{axis}.{name}={name}" for axis in AXES for name in kept[axis]]
    found = compose([*rest, *choices, *added, *(f"table.{axis}.{name}.{key}" for axis, name, key in keys)])
    asked = found.config["table"]
    for axis in AXES:
        own, given = found.choices[axis], {_top(key) for group, _, key in keys if group == axis}
        of_recipe = _differences(found.config[axis], asked[axis][own])
        for name, node in asked[axis].items():
            known = option_files.keys(f"{axis}/{name}") - given
            asked[axis][name] = _merged(node, {key: value for key, value in of_recipe.items() if key in known})
    return found.config, found.choices


def _narrowed(kept: Mapping[str, Sequence[str]], axis: str) -> bool:
    return kept[axis] != list(options(axis))


def _differences(node: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What a node has that the other has not, or otherwise: what a recipe sets in the option that it chooses.

    It holds for another option too where that has the key, as when `prune run` is told to choose another one.
    """
    found = {}
    for key, value in node.items():
        if key in other and isinstance(value, Mapping) and isinstance(other[key], Mapping):
            if inner := _differences(value, other[key]):
                found[key] = inner
        elif key not in other or value != other[key]:
            found[key] = value
    return found


def _merged(node: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The node with changes, which reach into the nodes inside it."""
    both = {key for key, value in changes.items() if isinstance(value, Mapping) and isinstance(node.get(key), Mapping)}
    return {**node, **changes, **{key: _merged(node[key], changes[key]) for key in both}}


def _top(key: str) -> str:
    """The first part of a dotted `key=value`."""
    return key.partition("=")[0].partition(".")[0]


def _stages(config: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The stages to ask, with the axes they use; those that only prepare for pruning together with it."""
    for name, node in config.items():
        if name in AXES or not isinstance(node, dict) or "_target_" not in node:
            continue
        axes = tuple(axis for axis in AXES if axis in node)
        if "regulariser" in axes:
            yield (name, "prune"), ("granularity", "regulariser")
        elif axes:
            yield (name,), axes


def render(cells: Sequence[Cell], *, reasons: bool = False) -> str:
    """The table as text: a block per stage, `yes` where a row and a column go together, `.` where they do not.

    Schedules that say the same everywhere share a block.

    Args:
        reasons: say under every block why its other combinations are refused.
    """
    blocks = []
    for where in dict.fromkeys(cell.where for cell in cells):
        here = [cell for cell in cells if cell.where == where]
        for schedules, block in _alike(here, reasons):
            head = f"{where}, schedule={','.join(schedules)}" if schedules else where
            blocks.append("\n".join([head, *_grid(block), *(_reasons(block) if reasons else ())]) + "\n")
    return "\n".join(blocks)


def _alike(cells: Sequence[Cell], reasons: bool) -> list[tuple[list[str], list[Cell]]]:
    """Schedules that say the same, with the cells of one of them; no schedules for a stage that uses none."""
    found: dict[tuple[object, ...], tuple[list[str], list[Cell]]] = {}
    for schedule in dict.fromkeys(cell.options.get("schedule") for cell in cells):
        own = [cell for cell in cells if cell.options.get("schedule") == schedule]
        said = tuple(cell.refusal if reasons else cell.refusal is None for cell in own)
        schedules, _ = found.setdefault(said, ([], own))
        schedules += [schedule] if schedule else []
    return list(found.values())


def _place(cell: Cell) -> tuple[str, str]:
    """The row and the column of a cell: what scores or prepares the units, and the units."""
    row = cell.options.get("criterion") or cell.options.get("regulariser") or ANY
    return row, cell.options.get("granularity", ANY)


def _grid(cells: Sequence[Cell]) -> list[str]:
    legal = {_place(cell): cell.refusal is None for cell in cells}
    rows, columns = (list(dict.fromkeys(place[axis] for place in legal)) for axis in (0, 1))
    width = max(map(len, rows))
    lines = [["".ljust(width), *columns]]
    lines += [[row.ljust(width), *(("yes" if legal[row, c] else ".").ljust(len(c)) for c in columns)] for row in rows]
    return ["  ".join(line).rstrip() for line in lines]


def _reasons(cells: Sequence[Cell]) -> list[str]:
    """The refusals, each with the combinations that it stands for."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.refusal:
            found.setdefault(cell.refusal, []).append("+".join(name for name in _place(cell) if name != ANY))
    return [f"{', '.join(places)}: {refusal}" for refusal, places in found.items()]
