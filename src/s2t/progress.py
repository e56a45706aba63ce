"""What long work shows on stderr: a line that moves every few seconds, with what is done, how fast, and the time left.

On a terminal it is a bar, in a log a line now and then. Whoever works says so with `count`, wherever it runs: in this process,
or in one whose counts lie in memory that the two share. Knows numbers and names, not what they stand for.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BEFORE_A_SHORT_BAR = 1.0
_COLUMNS = (TextColumn("{task.description:<28}"), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"))


@dataclass(slots=True)
class Counts:
    """Work that was done: items (problems, mostly), the same with parts of those under way, and tokens."""

    finished: float = 0.0
    credit: float = 0.0
    tokens: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.finished + other.finished, self.credit + other.credit, self.tokens + other.tokens)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.finished - other.finished, self.credit - other.credit, self.tokens - other.tokens)


_mine = Counts()  # of this process
_others: list[Any] = []  # shared memory that other processes add theirs to
_told: dict[str, Any] = {}  # of a process that works for another: that memory, what it was told, and when
_weight = threading.local()
_shown: list[Bar] = []  # the bar, and what goes on inside it


def count(finished: float = 0.0, credit: float | None = None, tokens: int = 0) -> None:
    """Note that so many items are finished, how much more of any is done (`credit`, as much unless given), and tokens."""
    weight = getattr(_weight, "value", 1.0)
    _mine.finished += weight * finished
    _mine.credit += weight * (finished if credit is None else credit)
    _mine.tokens += tokens
    if _told and time.monotonic() - _told["at"] > _SECONDS_BETWEEN_LOOKS:
        tell()


@contextmanager
def counted_as(weight: float) -> Iterator[None]:
    """Within it an item counts as so much of one: a half where it has to be written and read, nothing where it is for show."""
    before = getattr(_weight, "value", 1.0)
    _weight.value = before * weight
    try:
        yield
    finally:
        _weight.value = before


def shared_counts(context: Any) -> Any:
    """Memory for the counts of another process, which has to call `tell_through` with it."""
    _others.append(context.Array("d", 3))
    return _others[-1]


def tell_through(memory: Any) -> None:
    """From now on this process, which works for another, tells its counts there."""
    _told.update(memory=memory, said=Counts(), at=0.0)


def tell() -> None:
    """Tell the other process what was counted since."""
    if _told:
        news = _mine - _told["said"]
        with _told["memory"].get_lock():
            for place, value in enumerate(astuple(news)):
                _told["memory"][place] += value
        _told.update(said=_mine + Counts(), at=time.monotonic())


def _counted() -> Counts:
    return sum((Counts(*memory[:]) for memory in _others), _mine + Counts())


class Bar:
    """One piece of long work: `total` items (0: not known), of which some were done before; call it to advance."""

    def __init__(self, description: str, total: int, done: int = 0, unit: str = "problems") -> None:
        self.description, self.total, self.done, self.unit = description, total, done, unit
        self.first, self.start, self.before = done, time.monotonic(), _counted()

    def __call__(self, number: int = 1) -> None:
        """Note that so many more items are done, with all that belongs to them."""
        self.done += number

    @property
    def credit(self) -> float:
        """Items that are done, with parts of those under way."""
        return self._within(self.first + max((found := _counted() - self.before).credit, found.finished))

    def text(self) -> str:
        """What is done, how fast, and what is left."""
        found, seconds = _counted() - self.before, time.monotonic() - self.start
        done = int(self._within(self.first + found.finished) + 1e-6)
        parts = [f"{done:,} of {self.total:,} {self.unit}"] if self.total else []
        if found.tokens:
            parts.append(f"{found.tokens:,.0f} tokens, {found.tokens / max(seconds, 1e-3):,.0f} tokens/s")
        elif done > self.first:
            parts.append(f"{(done - self.first) / max(seconds, 1e-3):.3g} {self.unit}/s")
        parts.append(f"{_span(seconds)} so far")
        if self.total and (share := self.credit - self.first) > 0:
            parts.append(f"about {_span(seconds * (self.total - self.credit) / share)} left")
        return ", ".join(parts)

    def _within(self, number: float) -> float:
        return min(max(self.done, number), self.total) if self.total else max(self.done, number)


@contextmanager
def progress(
    description: str, total: int, done: int = 0, shown: bool = True, unit: str = "problems", brief: bool = False
) -> Iterator[Bar]:
    """Show how the block goes on; the yielded bar is called to advance, and `count` moves it in between.

    Not `shown` (one of several processes speaks for all), nothing is printed. Work inside other work shows behind it. What is
    `brief` is only shown while it takes long, and leaves no line.
    """
    bar = Bar(description, total, done, unit)
    if not shown or not _speaks():
        yield bar
        return
    _shown.append(bar)
    try:
        if len(_shown) > 1:
            yield bar
            return
        console = Console(stderr=True)
        over = threading.Event()
        show = _show_bar if console.is_terminal else _show_lines
        thread = threading.Thread(target=show, args=(console, over, brief), daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            over.set()
            thread.join()
        if not brief and not console.is_terminal:
            _print(console, f"{description}: {bar.total} done")
    finally:
        _shown.remove(bar)


def note(text: str) -> None:
    """One line on stderr, from the first process alone where several share the work."""
    if multiprocessing.parent_process() is None:
        _print(Console(stderr=True), text)


def _speaks() -> bool:
    """Whether this process may show anything: not one that works for another, nor the second of a launcher."""
    return multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0"


def _line() -> str:
    """What goes on now, the outermost work first."""
    first, *inside = list(_shown) or [Bar("", 0)]
    return first.text() + "".join(f"; {bar.description}: {bar.text()}" for bar in inside[-1:])


def _short_line() -> str:
    """As `_line`, for a terminal's width: the innermost work alone."""
    bar = _shown[-1]
    return bar.text() if bar is _shown[0] else f"{bar.description}: {bar.text()}"


def _show_lines(console: Console, over: threading.Event, brief: bool) -> None:
    while not over.wait(_SECONDS_BETWEEN_LINES):
        _print(console, f"{_shown[0].description}: {_line()}")


def _show_bar(console: Console, over: threading.Event, brief: bool) -> None:
    if brief and over.wait(_SECONDS_BEFORE_A_SHORT_BAR):
        return
    bar = _shown[0]
    with Progress(*_COLUMNS, console=console, transient=brief) as display:
        task = display.add_task(bar.description, total=None, facts="")
        is_over = False
        while not is_over:
            is_over = over.wait(_SECONDS_BETWEEN_LOOKS)
            display.update(task, total=bar.total or None, completed=bar.credit, facts=_short_line())


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _span(seconds: float) -> str:
    """A time as people say it: 45 s, 2:05 min, 1.6 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
