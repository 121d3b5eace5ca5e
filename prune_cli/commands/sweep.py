"""What belongs to a sweep as a whole: its folder, its joint tables, and whether it is the one that goes on there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune_cli.errors import CheckpointError, ConfigError
from prune_cli.files import artifacts
from prune_cli.reading import read_json

log = logging.getLogger("prune_cli")

SWEEP = "sweep.json"  # the overrides of a sweep, in its folder
JOB = "job.json"  # those of a job, in the job's folder


def claim(folder: Path, arguments: Sequence[str]) -> None:
    """Refuses a folder of another sweep, whose jobs would be mixed with this one's.

    Raises:
        ConfigError: what that sweep was.
    """
    if not (folder / SWEEP).exists():
        return
    try:
        known = read_json(folder / SWEEP).get("overrides")
    except CheckpointError:
        known = None
    if known != sorted(arguments):
        said = " ".join(map(str, known)) if isinstance(known, list) else f"one whose {SWEEP} cannot be read"
        raise ConfigError(f"--into {folder}: there lies another sweep ({said}); give another folder")


def note(sweep: Path, job: Path, arguments: Sequence[str], given: Sequence[str]) -> None:
    """Writes down what the sweep was asked for, and what of it the job does."""
    if not (sweep / SWEEP).is_file():
        artifacts.write_json(sweep / SWEEP, {"overrides": sorted(arguments)})
    artifacts.write_json(job / JOB, {"overrides": list(given)})


def collect(sweep: Path) -> None:
    """Writes the rows of all jobs of a sweep that are there so far into one results.csv."""
    import pandas
    from filelock import FileLock

    with FileLock(sweep / ".results.lock"):
        frames = [pandas.read_csv(path).assign(job=path.parent.name) for path in _tables(sweep)]
        with artifacts.new_file(sweep / artifacts.RESULTS) as temporary:
            pandas.concat(frames).to_csv(temporary, index=False)


def _tables(sweep: Path) -> list[Path]:
    return sorted(sweep.glob(f"*/{artifacts.RESULTS}"), key=lambda path: path.parent.name.zfill(6))


def finish(sweep: Path) -> None:
    """Prints one table of all jobs, a line for each, and the sweep's folder; takes a folder away that nothing came into."""
    jobs = [(path.parent, row) for path in _tables(sweep) if (row := _last(path))]
    if not jobs:
        _discard(sweep)
        return
    from prune_cli.console import figures, heads, table

    given = [_given(folder) for folder, _ in jobs]
    varied = [
        key for key in dict.fromkeys(key for one in given for key in one) if len({one.get(key) for one in given}) > 1
    ]
    lines = [
        (folder.name, *(one.get(key, "") for key in varied), *figures(row))
        for (folder, row), one in zip(jobs, given, strict=True)
    ]
    table(("job", *varied, *heads()), lines)
    sys.stdout.write(f"{sweep}\n")
    sys.stdout.flush()
    log.info("all rows: %s; a job: prune evaluate %s", sweep / artifacts.RESULTS, jobs[-1][0])


def _last(path: Path) -> dict[str, Any] | None:
    """The last row of a job's table, numbers as numbers; None where there is none."""
    import pandas

    try:
        rows = pandas.read_csv(path)
    except ValueError:  # damaged
        return None
    return None if rows.empty else {str(key): None if pandas.isna(v) else v for key, v in rows.iloc[-1].items()}


def _given(job: Path) -> dict[str, str]:
    """Override -> value, of a job."""
    try:
        found = read_json(job / JOB).get("overrides")
    except CheckpointError:
        return {}
    return dict(str(text).partition("=")[::2] for text in found) if isinstance(found, list) else {}


def _discard(sweep: Path) -> None:
    """Removes a sweep's folder in which no job left anything."""
    for name in ("multirun.yaml", SWEEP, ".results.lock"):
        (sweep / name).unlink(missing_ok=True)
    remove_empty(sweep)


def remove_empty(folder: Path) -> None:
    """Removes a folder under ./outputs and those that it is in, as far as they are empty."""
    outputs = Path("outputs").resolve()
    folder = folder.resolve()
    while folder == outputs or outputs in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
