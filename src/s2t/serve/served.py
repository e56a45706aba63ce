"""The backend of an SLM that runs on other servers: jobs become requests to them, as many at once as there are rows.

The requests live in the client's event loop. A job that is cancelled takes its requests with it, and the servers drop them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial

from transformers import PreTrainedTokenizerBase

from s2t.decode.pair import Pair
from s2t.decode.remote.client import Client
from s2t.decode.remote.continuous import ContinuousRemoteDecoder
from s2t.errors import RemoteError
from s2t.methods.strategies import Strategy
from s2t.model.stops import Stops
from s2t.records import Step
from s2t.serve.backend import Event, Failed, Job, WrittenToken

log = logging.getLogger("s2t.serve")

_MOMENT_S = 0.01  # how long a step waits for news while commands may come
_UNANSWERED = ("the servers that run the model do not answer; try again later", 503)
_REFUSED = ("the servers that run the model refuse the request; this server's log says why", 502)
_FRESH_S = 1.0  # how long it holds that the servers answered when they were asked


class ServedBackend:
    """A `Backend` over `pair.served_slm`; `pair.batch_size` sequences are written at once, of all strategies together."""

    def __init__(self, pair: Pair, strategies: Mapping[str, Strategy], max_length: int) -> None:
        assert pair.served_slm is not None
        self.pair, self.slm = pair, pair.served_slm
        self._decoders = {
            name: ContinuousRemoteDecoder.of(self.slm, strategy, max_length, self._ends)
            for name, strategy in strategies.items()
        }
        self._room = asyncio.Semaphore(pair.batch_size)
        self._num_running = 0
        self._open: dict[int, tuple[Job, Future[None]]] = {}
        self._stops: dict[int, Stops] = {}
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._answered = -math.inf

    @property
    def strategies(self) -> Sequence[str]:
        return list(self._decoders)

    @property
    def num_rows(self) -> int:
        return self.pair.batch_size

    @property
    def is_busy(self) -> bool:
        return bool(self._open)

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._open) - self._num_running)

    @property
    def is_cut_off(self) -> bool:
        return self.slm.client.is_cut_off

    async def answers(self) -> bool:
        if time.monotonic() - self._answered > _FRESH_S:
            if not await asyncio.wrap_future(self.slm.client.start(lambda client: client.is_well())):
                return False
            self._answered = time.monotonic()
        return True

    def tokenizer_of(self, strategy: str) -> PreTrainedTokenizerBase:
        return self.pair.tokenizer_of(strategy)

    def add(self, job: Job) -> None:
        index = job.request.index
        if job.stops:
            self._stops[index] = Stops(self.tokenizer_of(job.strategy), job.stops)
        self._open[index] = job, self.slm.client.start(partial(self._write, job))

    def cancel(self, job: Job) -> None:
        if (found := self._forget(job)) is not None:
            found.cancel()

    def step(self) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self._events.get(timeout=_MOMENT_S))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            pass
        events = [event for event in events if event.job.request.index in self._open]
        for event in events:
            if isinstance(event, Failed) or event.step.finish_reason is not None:
                self._forget(event.job)
        return events

    async def _write(self, job: Job, client: Client) -> None:
        """One job from its turn to its end, in the client's event loop."""
        decoder = self._decoders[job.strategy]

        def emit(steps: Sequence[Step]) -> None:
            for step in steps:
                self._events.put(WrittenToken(job, step, decoder.readings.pop((step.request, step.index), None)))

        async with self._room:
            self._num_running += 1
            try:
                # What stop strings cut off is asked for in vain, so these sequences go on in short pieces, too.
                await decoder.write(client, job.request, emit, job.is_streamed or bool(job.stops))
            except RemoteError as error:  # names the servers, which clients need not know
                log.error("%s", error)
                self._events.put(Failed(job, *_UNANSWERED if error.status is None else _REFUSED))
            except Exception:
                log.exception("a request to the model's servers failed")
                self._events.put(Failed(job, "the answer could not be written; the server's log says why"))
            finally:
                self._num_running -= 1

    def _ends(self, index: int, token_id: int) -> bool:
        stops = self._stops.get(index)
        return stops is not None and stops.ends(index, token_id)

    def _forget(self, job: Job) -> Future[None] | None:
        self._stops.pop(job.request.index, None)
        found = self._open.pop(job.request.index, None)
        return None if found is None else found[1]
