"""`prune store [--gc]`: what the stage store keeps, and its broom."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from prune_cli.errors import ConfigError
from prune_cli.files.artifacts import CHECKPOINT, RESULTS

HELP = """usage: prune store [--gc [OUTPUTS]]

Lists finished stages with their sizes. --gc deletes results that no results.csv under OUTPUTS (default: outputs)
refers to, damaged ones, and leftovers of runs that no longer go on. The place is PRUNE_STORE or outputs/store.
"""


def main(arguments: list[str]) -> int:
    """Lists, or sweeps."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    from prune_cli.pipeline.store import Store, default_root, size

    store = Store(default_root())
    if arguments and arguments[0] == "--gc" and len(arguments) <= 2:
        outputs = Path(arguments[1] if len(arguments) == 2 else "outputs")
        if not outputs.is_dir():
            raise ConfigError(f"{outputs} is not a folder; say where the runs are: prune store --gc OUTPUTS")
        count, freed = store.sweep(used_keys(outputs))
        sys.stdout.write(f"deleted {count} folders, {freed / 1e6:.1f} MB\n")
        return 0
    if arguments:
        raise ConfigError(f"prune store: unknown argument {arguments[0]!r}; there is --gc")
    import json

    total = 0
    for entry in store.entries():
        measured = json.loads((entry / CHECKPOINT).read_text())
        total += size(entry)
        facts = measured["measured"]
        sys.stdout.write(
            f"{entry.name}  {measured['model_name']:<20}  {facts['epochs']:>4} epochs  acc1 {facts['acc1']:6.2f}  "
            f"{size(entry) / 1e6:8.1f} MB\n"
        )
    unfinished = len(list(store.root.glob("*.partial"))) if store.root.is_dir() else 0
    sys.stdout.write(f"{len(store.entries())} stages, {total / 1e6:.1f} MB in {store.root}; {unfinished} unfinished\n")
    return 0


def used_keys(outputs: Path) -> set[str]:
    """The keys in all results.csv below a folder."""
    keys = set()
    for path in outputs.rglob(RESULTS):
        with path.open(newline="") as file:
            keys |= {row["key"] for row in csv.DictReader(file) if row.get("key")}
    return keys
