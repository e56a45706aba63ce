"""One progress bar on stderr for long work; a line every half minute when stderr is no terminal."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 30
_COLUMNS = (
    TextColumn("{task.description:<28}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
)


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; the yielded function advances it. On no terminal, a line now and then and at the end."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console, description, total, done).advance
        console.print(f"{description}: {total} done", highlight=False, soft_wrap=True)
        return
    with Progress(*_COLUMNS, console=console) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count=1: bar.advance(task, count)


def note(text: str) -> None:
    """One line on stderr, from the first process alone where several share the work."""
    if multiprocessing.parent_process() is None:
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


class _Lines:
    """Progress for a log: a line whenever half a minute has gone by."""

    def __init__(self, console: Console, description: str, total: int, done: int) -> None:
        self.console, self.description, self.total, self.done = console, description, total, done
        self.first, self.start = done, time.monotonic()
        self.last = self.start

    def advance(self, count: int = 1) -> None:
        """Note that so many more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.last < _SECONDS_BETWEEN_LINES or self.done >= self.total:
            return
        self.last = now
        left = (now - self.start) * (self.total - self.done) / (self.done - self.first)
        line = f"{self.description}: {self.done} of {self.total}, about {left / 60:.1f} min left"
        self.console.print(line, highlight=False, soft_wrap=True)
