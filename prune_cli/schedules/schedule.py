"""What a schedule says of itself before it runs."""

from __future__ import annotations

from collections.abc import Callable

from prune_cli.schedules.requests import Done, Memo, Request, Train

Schedule = Callable[[Memo | None], tuple[Memo, Request]]


def most_epochs(schedule: Schedule) -> int | None:
    """Epochs that a schedule trains at most; None where it cannot say.

    Raises:
        ConfigError: values of its parameters that it does not take.
    """
    epochs = 0
    memo, request = schedule(None)
    while not isinstance(request, Done):
        epochs = request.until if isinstance(request, Train) else epochs
        memo, request = schedule(memo)
    return epochs
