"""Independent shards worked in this process, or shared by several, each with models of its own.

Several processes pay where one model leaves most of the machine idle: small models on a CPU. Several threads of one process
pay where the work waits for servers: they share the models and take turns, one computing while the others wait. What a
shard holds never depends on who worked it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any, Generic, TypeVar

from s2t.progress import shared_counts, tell, tell_through

S = TypeVar("S")
J = TypeVar("J")
R = TypeVar("R")

_turn = threading.Lock()  # held by the one thread that works; the others wait, for it or for a server
_mine = threading.local()
_worker: dict[str, Any] = {}  # of a worker process: how to open its state, and the state


class _Stopped(BaseException):
    """Another job failed, or the whole was interrupted: this one's result has no use."""


@contextlib.contextmanager
def turn(is_over: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Work in turns: of all threads inside, one runs at a time, until it waits or is done, or everything `is_over`."""
    with _turn:
        _mine.is_held, _mine.is_over = True, is_over
        try:
            yield
        finally:
            _mine.is_held = False


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Let another thread have this one's turn, if it has one, while it waits for something far away."""
    if not getattr(_mine, "is_held", False):
        yield
        return
    _mine.is_held = False
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()
        _mine.is_held = True
    if _mine.is_over():
        raise _Stopped


class Workers(Generic[S]):
    """`count` processes that each call `open` once, at their first job; with 1 the work is done in this process.

    There, `threads` jobs are worked at once, in turns, on one state. `open`, the work, jobs and results must be picklable
    when `count` is above 1. Use as a context manager.
    """

    def __init__(self, open: Callable[[], S], count: int = 1, threads: int = 1) -> None:
        self._open, self._count, self._threads = open, count, threads
        self._state: S | None = None
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers[S]:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[[S, J], R], jobs: Sequence[J]) -> Iterator[tuple[J, R]]:
        """(job, result) as they get done, in any order; the first error of a job is raised here."""
        if self._count == 1 and jobs:
            if self._state is None:
                self._state = self._open()
            if self._threads == 1:
                for job in jobs:
                    yield job, work(self._state, job)
            else:
                yield from self._in_turns(self._state, work, jobs)
        if self._count == 1:
            return
        if self._pool is None:
            self._pool = self._start()
        futures = {self._pool.submit(_call, work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def _in_turns(self, state: S, work: Callable[[S, J], R], jobs: Sequence[J]) -> Iterator[tuple[J, R]]:
        over = threading.Event()

        def one(job: J) -> R:
            with turn(over.is_set):
                return work(state, job)

        pool = ThreadPoolExecutor(min(self._threads, len(jobs)))
        try:
            futures = {pool.submit(one, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            over.set()
            pool.shutdown(cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        import torch

        threads = max(1, torch.get_num_threads() // self._count)
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        return ProcessPoolExecutor(
            self._count,
            mp_context=context,
            initializer=_begin,
            initargs=(self._open, threads, shared_counts(context)),
        )


def _begin(open: Callable[[], Any], threads: int, counts: Any) -> None:
    import torch

    tell_through(counts)
    _worker["open"] = open
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(work: Callable[[Any, Any], Any], job: Any) -> Any:
    if "state" not in _worker:
        _worker["state"] = _worker["open"]()
    try:
        return work(_worker["state"], job)
    finally:
        tell()
