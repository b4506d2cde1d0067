"""Progress of long preparations: one bar in a terminal, a line now and then elsewhere.

Training has a bar of its own (``callbacks.progress``); this one is for what comes before it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between lines where there is no terminal

T = TypeVar("T")


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The items, one step of progress each, on standard error.

    Args:
        items: What is gone through.
        label: What is being done.
        total: How many there are; None asks ``len``, where there is one.

    Example:
        >>> [letter.upper() for letter in track("ab", "letters")]
        ['A', 'B']
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with advancing(label, total) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def advancing(
    label: str,
    total: int | None = None,
    *,
    line_seconds: float = LINE_SECONDS,
    is_shown: bool = True,
) -> Iterator[Callable[[int], None]]:
    """Inside the block the function that is given out moves the progress by some steps.

    Args:
        label: What is being done.
        total: Steps in all; None where unknown.
        line_seconds: Seconds between lines where standard error is no terminal. What takes less
            prints none.
        is_shown: False shows nothing.
    """
    if not is_shown:
        yield lambda steps: None
        return
    if not sys.stderr.isatty():
        yield _lines(label, total, line_seconds)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def advance(steps: int) -> None:
            bar.advance(task, steps)

        yield advance


def _lines(label: str, total: int | None, line_seconds: float) -> Callable[[int], None]:
    done, last = 0, time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last >= line_seconds:
            last = time.monotonic()
            print(f"{label} {done}/{total or '?'}", file=sys.stderr, flush=True)

    return advance
