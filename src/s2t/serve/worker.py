"""The thread that owns the backend: jobs in through a bounded queue, events out to whoever listens.

Knows nothing of HTTP. `submit` and `cancel` may be called from any thread; events are handed over in batches, one call per
step, on the worker's thread.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from s2t.serve.backend import Backend, Event, Failed, Job

log = logging.getLogger("s2t.serve")

_RATE_OVER_S = 30.0


class QueueFull(Exception):
    """There is no room for these jobs now; `retry_after_s` says when there may be."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class Draining(Exception):
    """The server is about to stop and takes nothing new."""


class Worker:
    """Runs jobs on a backend in a thread of its own; at most `num_rows` + `max_queue` of them at a time."""

    def __init__(self, backend: Backend, max_queue: int, on_events: Callable[[list[Event]], None]) -> None:
        self.backend, self.on_events = backend, on_events
        self.capacity = backend.num_rows + max_queue
        self._commands: queue.SimpleQueue[tuple[str, Sequence[Job]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[int, Job] = {}
        self._finished: deque[float] = deque(maxlen=256)
        self._is_draining = False
        self._thread = threading.Thread(target=self._run, name="s2t-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def num_open(self) -> int:
        """Jobs that are waiting or being written."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Jobs that have no row yet."""
        return min(self.num_open, self.backend.num_waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of these jobs, or none: raises QueueFull or Draining."""
        with self._lock:
            if self._is_draining or not self.is_alive:
                raise Draining
            if len(self._open) + len(jobs) > self.capacity:
                raise QueueFull(self.retry_after())
            self._open.update((job.request.index, job) for job in jobs)
        self._commands.put(("add", jobs))

    def cancel(self, jobs: Sequence[Job]) -> int:
        """Forget those of the jobs that have not ended, and free their rows; returns how many there were."""
        with self._lock:
            left = [job for job in jobs if self._open.pop(job.request.index, None) is not None]
        if left:
            self._commands.put(("cancel", left))
        return len(left)

    def drain(self) -> None:
        """Take nothing new from now on; what was taken goes on."""
        with self._lock:
            self._is_draining = True

    def abort(self, message: str, status: int = 500) -> None:
        """End every job that is left, with an error."""
        with self._lock:
            left = list(self._open.values())
            self._open.clear()
        if left:
            self._commands.put(("cancel", left))
            self.on_events([Failed(job, message, status) for job in left])

    def close(self, seconds: float | None = None) -> None:
        """Stop the thread, and wait so long for it, at most; jobs that are left get no further event."""
        self.drain()
        self._commands.put(("close", ()))
        self._thread.join(seconds)

    def retry_after(self) -> int:
        """Seconds until about a row's worth of room, from the rate at which jobs ended lately; 1 to 60."""
        now = time.monotonic()
        recent = sum(now - at < _RATE_OVER_S for at in tuple(self._finished))  # the engine's thread adds to it
        wanted = max(1, len(self._open) // 4)
        return max(1, min(60, math.ceil(wanted * _RATE_OVER_S / max(recent, 1))))

    def _run(self) -> None:
        try:
            while self._obey():
                if self.backend.is_busy:
                    self._hand_over(self.backend.step())
        except BaseException:  # nothing may end this thread unnoticed: clients would wait for ever
            log.exception("the engine thread failed; the server has to be started again")
            self._is_draining = True
            self.abort("the engine failed; the server's log says why")

    def _obey(self) -> bool:
        """Carry out the commands that are there; waits for one while there is nothing to write. False: close."""
        while True:
            try:
                verb, jobs = self._commands.get(block=not self.backend.is_busy)
            except queue.Empty:
                return True
            if verb == "close":
                return False
            for job in jobs:
                self.backend.cancel(job) if verb == "cancel" else self._add(job)

    def _add(self, job: Job) -> None:
        try:
            self.backend.add(job)
        except Exception:  # no memory for a strategy's first engine, say
            log.exception("a job could not be started")
            self._hand_over([Failed(job, "the engine could not start this answer; the server's log says why")])

    def _hand_over(self, events: list[Event]) -> None:
        told = []
        with self._lock:
            for event in events:
                index = event.job.request.index
                if index not in self._open:  # cancelled meanwhile
                    continue
                told.append(event)
                if isinstance(event, Failed) or event.step.finish_reason is not None:
                    del self._open[index]
                    self._finished.append(time.monotonic())
        if told:
            self.on_events(told)
