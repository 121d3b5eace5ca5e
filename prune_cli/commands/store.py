"""`prune store [--gc]`: what the stage store keeps, and its broom."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from prune_cli.errors import CheckpointError, ConfigError, PruneError
from prune_cli.files.artifacts import RESULTS
from prune_cli.reading import read_table

if TYPE_CHECKING:
    from prune_cli.pipeline.store import Store

HELP = """usage: prune store
       prune store --gc [OUTPUTS ...] [--hours N] [--dry-run]

Lists finished stages with their sizes. --gc deletes results that no results.csv refers to, in any run folder that ever
took from the store or under OUTPUTS (default: outputs), damaged ones, and leftovers of runs that no longer go on. What a
process is computing stays, and what was made or taken in the last N hours (default: 24). The place is PRUNE_STORE or
outputs/store.

  --hours N   0 keeps nothing for its age
  --dry-run   say what would go, and why, and delete nothing
"""

HOURS = 24.0


class _Parser(argparse.ArgumentParser):
    """argparse that leaves printing and exit codes to `prune`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"prune store: {message}; see prune store --help")


def main(arguments: list[str]) -> int:
    """Lists, or sweeps."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    parser = _Parser(prog="prune store", add_help=False)
    parser.add_argument("--gc", nargs="*", type=Path, metavar="OUTPUTS")
    parser.add_argument("--hours", type=float)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    if given.gc is None and (given.hours is not None or given.dry_run):
        raise ConfigError("prune store: --hours and --dry-run go with --gc")
    if given.hours is not None and not 0 <= given.hours < float("inf"):
        raise ConfigError(f"prune store: --hours {given.hours}: give a number from 0")
    from prune_cli.pipeline.store import Store, default_root

    store = Store(default_root())
    if given.gc is None:
        _list(store)
    else:
        _sweep(store, given.gc, HOURS if given.hours is None else given.hours, given.dry_run)
    return 0


def _list(store: Store) -> None:
    """One line per result; damaged ones are said after the others.

    Raises:
        CheckpointError: there are damaged ones.
    """
    from prune_cli.files.checkpoint import read_checkpoint
    from prune_cli.pipeline.store import TABLE, size

    total, damaged = 0, []
    entries = store.entries()
    for entry in entries:
        total += (held := size(entry))
        try:
            stored = read_checkpoint(entry)
        except PruneError as error:
            damaged.append(str(error))
            continue
        facts = stored.measured
        sys.stdout.write(
            f"{entry.name}  {stored.model_name:<20}  {facts['epochs']:>4} epochs  acc1 {facts['acc1']:6.2f}  "
            f"{held / 1e6:8.1f} MB\n"
        )
    unfinished = len(list(store.root.glob("*.partial"))) if store.root.is_dir() else 0
    tables = list(store.root.glob(f"*{TABLE}")) if store.root.is_dir() else []
    of_teachers = f"; {len(tables)} tables of logits, {sum(map(size, tables)) / 1e6:.1f} MB" if tables else ""
    sys.stdout.write(
        f"{len(entries)} stages, {total / 1e6:.1f} MB in {store.root}; {unfinished} unfinished{of_teachers}\n"
    )
    if damaged:
        raise CheckpointError(f"{len(damaged)} of them damaged, to be computed again when needed: {damaged[0]}")


def _sweep(store: Store, given: list[Path], hours: float, dry: bool) -> None:
    """Deletes what no run needs, or says what that is.

    Raises:
        ConfigError: a folder that is none.
        CheckpointError: a results.csv that cannot be read, so that nobody knows what it refers to.
    """
    for folder in given:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; say where runs are: prune store --gc OUTPUTS")
    referring = store.referring()
    leftovers = store.sweepable(used_keys([*(given or [Path("outputs")]), *referring]), 3600 * hours)
    freed = sum(one.bytes for one in leftovers)
    if dry:
        for one in leftovers:
            sys.stdout.write(f"{one.path.name}  {one.bytes / 1e6:8.1f} MB  {one.why}\n")
        sys.stdout.write(f"would delete {len(leftovers)} folders, {freed / 1e6:.1f} MB\n")
    else:
        sys.stdout.write(f"deleted {store.sweep(leftovers)} folders, {freed / 1e6:.1f} MB\n")
    sys.stdout.write(
        f"kept: what {len(referring)} run folders refer to, what is being computed, and what is younger than {hours:g} hours "
        "(--hours 0: whatever its age)\n"
    )


def used_keys(folders: list[Path]) -> set[str]:
    """The keys in all results.csv below some folders."""
    paths = {path.resolve() for folder in folders for path in folder.rglob(RESULTS)}
    return {row["key"] for path in sorted(paths) for row in read_table(path) if row.get("key")}
