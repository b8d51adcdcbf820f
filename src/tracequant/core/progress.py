"""Progress bars on standard error, with time left."""

from __future__ import annotations

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


def track(items: Iterable[T], description: str, enabled: bool, completed: int = 0) -> Iterator[T]:
    """Yield `items`, drawing a bar while `enabled` and standard error is a terminal.

    `completed` counts the items that an earlier run has done already.
    """
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield from items
        return
    try:
        total: int | None = completed + len(items)  # type: ignore[arg-type]
    except TypeError:
        total = None
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
