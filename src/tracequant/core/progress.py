"""Progress on standard error: a bar with the time left in a terminal, a line now and then in a pipe or a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

# Seconds between two lines in a pipe or a file; what is shorter says nothing.
LINE_SECONDS = 10.0


def track(items: Iterable[T], description: str, enabled: bool, completed: int = 0) -> Iterator[T]:
    """Yield `items`, showing while `enabled` how far they are.

    `completed` counts the items that an earlier run has done already.
    """
    if not enabled:
        yield from items
        return
    try:
        total: int | None = completed + len(items)  # type: ignore[arg-type]
    except TypeError:
        total = None
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _with_lines(items, description, completed, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(description, total=total, completed=completed)
        for item in items:
            yield item
            progress.advance(bar)


def _with_lines(items: Iterable[T], description: str, completed: int, total: int | None) -> Iterator[T]:
    """Yield `items` and print a line at most every `LINE_SECONDS`."""
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= LINE_SECONDS and (total is None or completed + done < total):
            last = now
            text = f"{description}: {completed + done}"
            if total is not None:
                left = (now - start) / done * (total - completed - done)
                text += f" of {total}, about {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)
