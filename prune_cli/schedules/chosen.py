"""What a candidate of an earlier search keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from prune_cli.config.locations import find_file
from prune_cli.errors import ScheduleError
from prune_cli.files import artifacts
from prune_cli.reading import read_table, shown
from prune_cli.schedules.problem import Problem
from prune_cli.schedules.requests import Mask
from prune_cli.schedules.schedule import Requests, trains_at_most

DIGITS = 9  # of a count of units


@trains_at_most(lambda: 0)
def chosen(
    problem: Problem, *, search: Path | None = None, candidate: Annotated[int, Field(ge=1)] | None = None
) -> Requests:
    """Masks what a candidate of an earlier search keeps, in one step; recovery is left to finetune.

    Args:
        problem: what is pruned.
        search: table of an earlier search: search.csv, or front.csv. None: the whole ratio or budget, as one_shot.
        candidate: of the table's column `candidate`; in place of ratio and budget.

    Raises:
        ScheduleError: only one of both is given, or the table is not of a search of this network's groups.
    """
    if (search is None) != (candidate is None):
        raise ScheduleError(
            "schedule: search and candidate go together: schedule.search=RUN/prune/front.csv schedule.candidate=NUMBER"
        )
    yield Mask() if search is None or candidate is None else Mask(kept=_read(problem, search, candidate))


def _read(problem: Problem, search: Path, candidate: int) -> dict[str, int]:
    """What a candidate of a table keeps."""
    rows = {row.get("candidate", ""): row for row in read_table(find_file(search), ScheduleError)}
    if (row := rows.get(str(candidate))) is None:
        there = (
            f"{len(rows)} rows, {' '.join(list(rows)[:8])}{' ...' if len(rows) > 8 else ''}" if any(rows) else "none"
        )
        raise ScheduleError(f"schedule.candidate={candidate}: {search} has {there} in its column `candidate`")
    kept = {name.removeprefix(artifacts.KEPT): count for name, count in row.items() if name.startswith(artifacts.KEPT)}
    if set(kept) != set(problem.whole):
        other = sorted(set(kept) ^ set(problem.whole))
        raise ScheduleError(
            f"schedule.search={search}: it is of other groups of units: {', '.join(other[:3])}"
            f"{' ...' if len(other) > 3 else ''}; give the table of a search of this network with this granularity"
        )
    for name, count in kept.items():
        group = problem.group(name)
        if not count.isdecimal() or len(count) > DIGITS or not min(1, group.whole) <= int(count) <= group.whole:
            raise ScheduleError(
                f"schedule.search={search}: {shown(count)} units of {name} cannot stay, only from 1 to {group.whole}"
            )
    return {name: int(count) for name, count in kept.items()}
