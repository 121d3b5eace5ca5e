"""What the user sees while a run goes on: bars on a terminal, plain timestamped lines elsewhere, tables at the end.

TensorBoard scalars too, where asked for: a stage's losses and accuracies appear while it trains.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from prune_cli.errors import ConfigError
from prune_cli.files.artifacts import Row

log = logging.getLogger(__name__)

Scalar = Callable[[str, float, int], None]
"""Takes a scalar's name, its value, and the epoch, from 1."""

_stderr = RichConsole(stderr=True, highlight=False)


class Handler(logging.Handler):
    """Log lines on stderr: above the running bar on a terminal, with a timestamp elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            if _stderr.is_terminal:
                _stderr.print(text, markup=False)
            else:
                stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
                sys.stderr.write(f"{stamp} {text}\n")
        except Exception:
            self.handleError(record)


class Console:
    """Progress of training: call `tick` after every step; bars and lines are drawn a few times a second at most.

    Args:
        quiet_seconds: least time between two lines about one training where stderr is no terminal.
        scalar: takes the figures of every epoch.
    """

    def __init__(self, *, quiet_seconds: float = 10.0, scalar: Scalar | None = None) -> None:
        self._quiet, self._scalar = quiet_seconds, scalar
        self._told: set[tuple[str, float]] = set()
        self._held_out = ""
        self._bar: Progress | None = None
        self._images, self._since, self._last = 0, time.monotonic(), time.monotonic()

    @contextmanager
    def training(self, stage: str, epoch: int, epochs: int, steps: int) -> Iterator[None]:
        """Shows one training from `epoch` to `epochs`, of `steps` batches each, while the context lasts."""
        self._stage, self._epochs, self._steps, self._held_out = stage, epochs, steps, ""
        self._images, self._since, self._last = 0, time.monotonic(), time.monotonic()
        if not _stderr.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_stderr, transient=True, refresh_per_second=4) as bar:
            self._bar = bar
            self._task = bar.add_task(stage, total=epochs * steps, completed=epoch * steps, facts="")
            try:
                yield
            finally:
                self._bar = None

    def tick(self, epoch: int, step: int, count: int, rate: float, loss: float) -> None:
        """Takes note of one step: `epoch` from 0, `step` done in it, images in the batch, learning rate, mean loss."""
        self._images += count
        now = time.monotonic()
        if now - self._last < (0.2 if self._bar else self._quiet):
            return
        speed = self._images / max(now - self._since, 1e-9)
        self._last = now
        facts = f"loss {loss:.4f}  lr {rate:.2g}  {speed:,.0f} images/s{self._held_out}"
        if self._bar:
            self._bar.update(self._task, completed=epoch * self._steps + step, facts=facts)
            return
        left = ((self._epochs - epoch) * self._steps - step) * count / max(speed, 1e-9)
        where = f"epoch {epoch + 1}/{self._epochs} step {step}/{self._steps}"
        log.info("%s: %s  %s  %s left", self._stage, where, facts, clock(left))

    def history(self, stage: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Takes note of a stage's epochs, those of earlier calls among them: in the run's log, and as scalars."""
        for row in rows:
            epoch = row["epoch"]
            if (stage, epoch) in self._told:
                continue
            self._told.add((stage, epoch))
            figures = {name: value for name, value in row.items() if name != "epoch" and value is not None}
            log.debug("%s: epoch %d: %s", stage, epoch, "  ".join(f"{k} {v:.6g}" for k, v in figures.items()))
            self._held_out = f"  held out {figures['acc1']:.2f} %" if "acc1" in figures else self._held_out
            if self._scalar is not None:
                for name, value in figures.items():
                    self._scalar(f"{stage}/{name}", value, int(epoch))


@contextmanager
def tensorboard(folder: Path) -> Iterator[Scalar]:
    """Writes scalars to `folder`/tensorboard while the context lasts.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard=true needs the extra: pip install 'prune-cli[tensorboard]'") from error
    with SummaryWriter(str(folder / "tensorboard"), flush_secs=10) as writer:
        yield writer.add_scalar


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: float) -> str:
    """A count with three digits and a unit: 40.6 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def results_table(rows: Sequence[Row]) -> None:
    """Prints the final table of a run on stdout."""
    lines = [
        (
            row.stage,
            f"{row.acc1:.2f}",
            "" if row.acc1_delta is None else f"{row.acc1_delta:+.2f}",
            f"{100 * row.sparsity:.1f} %",
            count(row.params_nonzero),
            count(row.macs_nonzero),
            "" if row.latency_ms_b1 is None else f"{row.latency_ms_b1:.2f}",
            clock(row.seconds),
        )
        for row in rows
    ]
    table(("stage", "acc1", "vs dense", "zeros", "params", "MACs", "ms", "time"), lines)
    for row in rows:
        if row.slower_than_dense:
            log.warning("%s: the smaller network is slower than the dense one at batch 1 or 64", row.stage)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table on stdout; the first column is left-aligned, the others right."""
    drawn = Table()
    for index, name in enumerate(columns):
        drawn.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*(str(cell) for cell in row))
    console = RichConsole()
    if not console.is_terminal:  # in a file or a pipe nothing need be cut to fit
        console = RichConsole(width=max(80, RichConsole(width=500).measure(drawn).maximum))
    console.print(drawn)
