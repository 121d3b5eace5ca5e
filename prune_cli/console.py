"""What the user sees while a run goes on: bars on a terminal, plain timestamped lines elsewhere, tables at the end.

TensorBoard scalars too, where asked for: a stage's losses and accuracies appear while it trains.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table

from prune_cli import progress
from prune_cli.errors import ConfigError
from prune_cli.files.artifacts import Row
from prune_cli.progress import clock, stderr

log = logging.getLogger(__name__)

Scalar = Callable[[str, float, int], None]
"""Takes a scalar's name, its value, and the epoch, from 1."""


class Handler(logging.Handler):
    """Log lines on stderr: above the running bar on a terminal, with a timestamp elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.lower()}: {text}"
            if stderr.is_terminal:
                stderr.print(text, markup=False)
            else:
                stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
                sys.stderr.write(f"{stamp} {text}\n")
        except Exception:
            self.handleError(record)


def listen(level: int) -> None:
    """Shows log lines from `level` on, for a command that writes no log of its own."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, Handler)]:
        root.removeHandler(handler)
    root.addHandler(Handler(level))
    logging.getLogger("prune_cli").setLevel(level)


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
        self._place = ""
        self._bar: progress.Shown | None = None
        self._images, self._since, self._last = 0, time.monotonic(), time.monotonic()

    def stage(self, number: int, total: int) -> None:
        """Takes note of which stage of the run begins."""
        self._place = f", stage {number} of {total}"

    @contextmanager
    def training(self, stage: str, epoch: int, epochs: int, steps: int) -> Iterator[None]:
        """Shows one training from `epoch` to `epochs`, of `steps` batches each, while the context lasts."""
        self._stage, self._epochs, self._steps, self._held_out = stage, epochs, steps, ""
        self._images, self._since, self._last = 0, time.monotonic(), time.monotonic()
        if not progress.on_screen():
            yield
            return
        with progress.shown(f"{stage}{self._place}", epochs * steps, delay=0) as self._bar:
            self._bar.update(epoch * steps, [f"epoch {epoch + 1}/{epochs}"])
            try:
                yield
            finally:
                self._bar = None

    def tick(self, epoch: int, step: int, count: int, rate: float, loss: float) -> None:
        """Takes note of one step: `epoch` from 0, `step` done in it, images in the batch, learning rate, mean loss."""
        self._images += count
        now = time.monotonic()
        if now - self._last < (progress.REFRESH if self._bar else self._quiet):
            return
        speed = self._images / max(now - self._since, 1e-9)
        self._last = now
        left = clock(((self._epochs - epoch) * self._steps - step) * count / max(speed, 1e-9))
        at, fast = f"epoch {epoch + 1}/{self._epochs}", f"{speed:,.0f} images/s"
        learning = [f"loss {loss:.4f}", *([self._held_out] if self._held_out else []), f"lr {rate:.2g}"]
        if self._bar:
            self._bar.update(epoch * self._steps + step, [at, f"{left} left", fast, *learning])
            return
        facts = "  ".join([f"loss {loss:.4f}", f"lr {rate:.2g}", fast, *([self._held_out] if self._held_out else [])])
        log.info("%s: %s step %d/%d  %s  %s left", self._stage, at, step, self._steps, facts, left)

    def history(self, stage: str, rows: Sequence[Mapping[str, float]]) -> None:
        """Takes note of a stage's epochs, those of earlier calls among them: in the run's log, and as scalars."""
        for row in rows:
            epoch = row["epoch"]
            if (stage, epoch) in self._told:
                continue
            self._told.add((stage, epoch))
            figures = {name: value for name, value in row.items() if name != "epoch" and value is not None}
            log.debug("%s: epoch %d: %s", stage, epoch, "  ".join(f"{k} {v:.6g}" for k, v in figures.items()))
            self._held_out = f"held out {figures['acc1']:.2f} %" if "acc1" in figures else self._held_out
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


def count(number: float) -> str:
    """A count with three digits and a unit: 40.6 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


_HEADS = ("stage", "acc1\n%", "vs dense\npoints", "zeros", "params\nnonzero", "MACs\nnonzero", "ms\nbatch 1", "time")


def heads(*, timed: bool = True) -> tuple[str, ...]:
    """The heads of `figures`."""
    return _HEADS if timed else tuple(head for head in _HEADS if not head.startswith("ms"))


def figures(row: Mapping[str, Any], *, timed: bool = True) -> tuple[str, ...]:
    """What tables on the screen say of a row of results.csv; without the latency where nothing was `timed`."""
    latency = row["latency_ms_b1"]
    return (
        row["stage"],
        f"{row['acc1']:.2f}",
        "" if row["acc1_delta"] is None else f"{row['acc1_delta']:+.2f}",
        f"{100 * row['sparsity']:.1f} %",
        count(row["params_nonzero"]),
        count(row["macs_nonzero"]),
        *(["" if latency is None else f"{latency:.2f}"] if timed else []),
        clock(row["seconds"]),
    )


def results_table(rows: Sequence[Row]) -> None:
    """Prints the final table of a run on stdout."""
    timed = any(row.latency_ms_b1 is not None for row in rows)
    table(heads(timed=timed), [figures(asdict(row), timed=timed) for row in rows])
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
