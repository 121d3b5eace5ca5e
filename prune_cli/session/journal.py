"""The journal of a prune stage: every request's fingerprint and answer, appended at once to a small file of `Lines`.

    {"request": FINGERPRINT, "answer": ...}
    {"request": FINGERPRINT, "part": 3, "answer": ..., "seconds": ...}    one of the answers that make up the next

The first line is the problem that the schedule began with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_cli.files import artifacts
from prune_cli.files.lines import Lines
from prune_cli.training.distributed import World

NAME = "journal"


@dataclass
class Record:
    """What a journal holds.

    Attributes:
        problem: what the schedule began with, plain data; None of a stage that has not begun.
        answers: (fingerprint, answer) of each request, in order.
        parts: index -> answer, of the request that was under way when the stage was cut.
        pending: the fingerprint of that request.
        spent: for each of `answers`, index -> seconds that this part of it took; `spending` of the parts under way.
    """

    problem: dict[str, Any] | None = None
    answers: list[tuple[str, Any]] = field(default_factory=list)
    parts: dict[int, Any] = field(default_factory=dict)
    pending: str | None = None
    spent: list[dict[int, float]] = field(default_factory=list, compare=False)
    spending: dict[int, float] = field(default_factory=dict, compare=False)


class Journal:
    """A journal in a folder; of several processes rank 0 alone reads and writes it.

    Args:
        folder: that of the stage's checkpoints.
        world: the processes of the run.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self._lines, self._world = Lines(folder / NAME), world

    def read(self) -> Record:
        """What is there, the same on every rank; a damaged end is cut off."""
        lines = self._world.broadcast(self._lines.read() if self._world.main else None)
        record = Record()
        for line in lines:
            if not isinstance(line, dict):
                return Record()  # another version's
            if record.problem is None:
                record.problem = line["problem"]
            elif "part" in line:
                if line["request"] != record.pending:
                    record.parts, record.spending, record.pending = {}, {}, line["request"]
                record.parts[line["part"]] = line["answer"]
                record.spending[line["part"]] = line.get("seconds", 0.0)
            else:
                record.answers.append((line["request"], line["answer"]))
                record.spent.append(record.spending if record.pending == line["request"] else {})
                record.parts, record.spending, record.pending = {}, {}, None
        return record

    def begin(self, problem: Mapping[str, Any]) -> None:
        """A new journal in place of what is there."""
        if self._world.main:
            with artifacts.writing(self._lines.path):
                self._lines.path.unlink(missing_ok=True)
            self._append({"problem": problem})

    def answered(self, fingerprint: str, answer: Any) -> None:
        """Adds a request's answer."""
        self._append({"request": fingerprint, "answer": answer})

    def part(self, fingerprint: str, index: int, answer: Any, seconds: float) -> None:
        """Adds one of the answers that make up that of the next request, and what it took."""
        self._append({"request": fingerprint, "part": index, "answer": answer, "seconds": seconds})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._world.main:
            self._lines.append(line)
