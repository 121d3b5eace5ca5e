"""`prune list [GROUP] [WORD]`: recipes and options with the first comment line of their files; `--legal`: what goes together.

Without `--legal` it imports no torch and no Hydra.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

from prune_cli.config import option_files
from prune_cli.config.locations import GROUPS, description, options
from prune_cli.errors import ConfigError, nearest
from prune_cli.reading import read_text

HELP = f"""usage: prune list [GROUP [WORD]]
       prune list --legal [--why] [GROUP=NAME[,NAME...]] [key=value ...]

Lists recipes and the options of every group, or of one: {", ".join(GROUPS)}. Recipes stand by dataset and by what they
remove. A word leaves those that have it in their name or line: prune list recipe slim

--legal prints which criteria, granularities, schedules and regularisers each stage takes together, as `prune run` would
check them; --why says under each table why the others are refused. criterion=wanda or stage=prune,sensitivity shows these
only. Asked is a small ResNet, unless a recipe, a model or a dataset is given; an option's keys are those of its file, unless
they are given too: prune list --legal criterion=movement schedule.start=1
"""

REMOVED = {
    "element": "single weights",
    "filter": "filters",
    "n_m": "N:M",
    "stripe": "stripes",
    "kernel": "kernels",
    "pattern": "patterns",
}
DEFAULTS = {"dataset": "digits", "granularity": "element"}  # of config.yaml


def main(arguments: list[str]) -> int:
    """Prints one line per option, or the tables of what goes together."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    if "--legal" in arguments:
        from prune_cli.pipeline.legality import render, table

        cells = table([argument for argument in arguments if argument not in ("--legal", "--why")])
        sys.stdout.write(render(cells, reasons="--why" in arguments))
        return 0
    groups, rest = [word for word in arguments if word in GROUPS], [word for word in arguments if word not in GROUPS]
    if rest and not groups:
        raise ConfigError(f"there is no group {rest[0]!r}{nearest(rest[0], GROUPS)}")
    seen: list[Path] = []
    for group in groups or GROUPS:
        found = {name: path for name, path in options(group).items() if _has(rest, name, path)}
        if rest and not found:
            raise ConfigError(f"no {group} has {' and '.join(rest)} in its name or line; see `prune list {group}`")
        seen += found.values()
        sys.stdout.write(f"{group}\n")
        if group == "recipe":
            for head, names in _by_kind(found):
                sys.stdout.write(f"\n  {head}\n" + "".join(_lines({name: found[name] for name in names}, 4)))
        else:
            sys.stdout.write("".join(_lines(found, 2)))
    unreadable = [error for path in seen if (error := _said(path)[1])]
    if unreadable:
        raise unreadable[0]
    return 0


def _said(path: Path) -> tuple[str, ConfigError | None]:
    """What an option's file says of itself, or that it cannot be read, and why: one file must not hide the others."""
    try:
        return description(path), None
    except ConfigError as error:
        return "(its file cannot be read)", error


def _has(words: list[str], name: str, path: Path) -> bool:
    text = f"{name} {_said(path)[0]}".lower()
    return all(word.lower() in text for word in words)


def _lines(found: Mapping[str, Path], indent: int) -> Iterator[str]:
    """A line per option; on a terminal its text goes on below itself, not below the name."""
    width = max(map(len, found), default=0)
    for name, path in found.items():
        head = " " * indent + f"{name:<{width}}  "
        text = _said(path)[0]
        if sys.stdout.isatty():
            room = shutil.get_terminal_size().columns
            yield textwrap.fill(text, max(room, 40), initial_indent=head, subsequent_indent=" " * len(head)) + "\n"
        else:
            yield head + text + "\n"


def _by_kind(found: Mapping[str, Path]) -> list[tuple[str, list[str]]]:
    """Recipes by dataset and by what they remove, in that order; those that cannot be read last."""
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(_kind(name), []).append(name)
    return sorted(kinds.items())


def _kind(recipe: str) -> str:
    """Dataset and granularity of a recipe, from the lines of its files that choose them."""
    chosen = dict(DEFAULTS)
    try:
        for path in option_files.files(f"recipe/{recipe}"):
            chosen |= dict(re.findall(r"^\s*- (?:override )?/(\w+): (\S+)", read_text(path, ConfigError), re.M))
    except (ConfigError, RecursionError):  # one file, or defaults in a circle, must not hide the others
        return "~ cannot be read"
    return f"{chosen['dataset']}, {REMOVED.get(chosen['granularity'], chosen['granularity'])}"
