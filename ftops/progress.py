"""A progress bar on standard error. Where that is no terminal there is none."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
REDRAWN = 0.1  # seconds: not by a thread, which would run beside what is timed


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[..., None]]:
    """Gives advance(by=1, what=None): so many more of `total` are done; from here on it is called `what`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    console, drawn = Console(stderr=True), time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        progress.refresh()

        def advance(by: int = 1, what: str | None = None) -> None:
            nonlocal drawn
            progress.update(task, advance=by, description=what)
            if what is not None or time.monotonic() - drawn >= REDRAWN:
                progress.refresh()
                drawn = time.monotonic()

        yield advance


def track(items: Iterable[T], what: str, total: int, done: Callable[[], int] | None = None) -> Iterator[T]:
    """The items, as they come. done(): how many of `total` there are by now; without it each item is one."""
    with bar(what, total) as advance:
        before = 0
        for item in items:
            yield item
            now = done() if done else before + 1
            advance(now - before)
            before = now
