"""Work in progress on the screen: bars on a terminal, a log line now and then elsewhere.

Nothing is drawn by a thread beside the work, which would disturb what is timed: a bar is drawn when the work says how far it
is. Bars are for commands; until `enable` is called, as from a program of the user's own, nothing is shown.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

log = logging.getLogger(__name__)

DELAY = 0.5  # seconds that work takes before it is shown
REFRESH = 0.2  # seconds between two drawings
QUIET = 10.0  # seconds between two log lines where there is no terminal
LEAST_BAR = 8  # characters

stderr = RichConsole(stderr=True, highlight=False)

Item = TypeVar("Item")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_lock = threading.RLock()
_drawn: list[Shown] = []  # what is on the screen, outermost first
_display: Progress | None = None
_enabled = False


def enable() -> None:
    """Lets bars and lines of progress appear from here on."""
    global _enabled
    _enabled = True


def on_screen() -> bool:
    """Whether bars are drawn."""
    return _enabled and stderr.is_terminal


class Shown:
    """One piece of work. Made by `shown`.

    Args:
        what: in front of the bar.
        total: units of the work, None where nobody knows.
    """

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.facts: tuple[str, ...] = ()
        self.task: TaskID | None = None
        self.closed = False
        self._began = self._told = time.monotonic()

    def update(self, done: int, facts: Sequence[str] | None = None) -> None:
        """Takes note of how much is done, and draws it if it is time.

        Args:
            facts: texts behind the bar, most important first: the last ones are left out where the screen is narrow. None:
                the count and the time left.
        """
        self.done = done
        now = time.monotonic()
        if now - self._told < (REFRESH if on_screen() else QUIET):
            return
        self._told = now
        self.facts = tuple(facts if facts is not None else self._own_facts(now))
        if on_screen():
            self.draw()
        elif facts is None and _enabled:
            log.info("%s: %s", self.what, "  ".join(self.facts))

    def _own_facts(self, now: float) -> list[str]:
        if self.total is None:
            return [str(self.done)]
        left = (now - self._began) * (self.total - self.done) / max(self.done, 1)
        return [f"{self.done}/{self.total}", f"{clock(left)} left"]

    def draw(self) -> None:
        """Draws it, if it is on the screen."""
        with _lock:
            if _display is None or self.task is None:
                return
            room = stderr.width - len(self.what) - LEAST_BAR - 2
            _display.update(self.task, completed=self.done, facts=fitting(self.facts, room))
            _display.refresh()

    def open(self) -> None:
        """Puts it on the screen, below what is there."""
        global _display
        with _lock:
            if self.closed or self.task is not None:
                return
            if _display is None:
                _display = _new_display()
                _display.start()
            self.task = _display.add_task(self.what, total=self.total, facts="")
            _drawn.append(self)
        self.draw()

    def close(self) -> None:
        """Takes it from the screen."""
        global _display
        with _lock:
            self.closed = True
            if self.task is None or _display is None:
                return
            _drawn.remove(self)
            _display.remove_task(self.task)
            self.task = None
            if not _drawn:
                _display.stop()
                _display = None


def _new_display() -> Progress:
    one_line = Column(no_wrap=True)
    return Progress(
        TextColumn("{task.description}", table_column=one_line),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
        console=stderr,
        transient=True,
        auto_refresh=False,
        expand=True,
    )


def fitting(facts: Sequence[str], room: int) -> str:
    """The first of the facts that fit into so many characters, side by side; at least the first."""
    text = "".join(facts[:1])
    for fact in facts[1:]:
        if len(text) + 2 + len(fact) > room:
            break
        text += f"  {fact}"
    return text


@contextmanager
def shown(what: str, total: int | None = None, *, delay: float = DELAY) -> Iterator[Shown]:
    """Shows work while the context lasts, from `delay` seconds on; the work says by `update` how far it is."""
    work = Shown(what, total)
    timer = threading.Timer(delay, work.open) if on_screen() else None
    if timer:
        timer.daemon = True
        timer.start() if delay > 0 else work.open()
    try:
        yield work
    finally:
        if timer:
            timer.cancel()
        work.close()


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, one after another, showing how many are done; `total` is their length where they have one."""
    length = getattr(items, "__len__", None)
    with shown(what, length() if total is None and length else total) as work:
        for number, item in enumerate(items, 1):
            yield item
            work.update(number)


def busy(what: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorates a function of which it is shown that it runs."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            with shown(what):
                return function(*args, **kwargs)

        return wrapped

    return decorate


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
