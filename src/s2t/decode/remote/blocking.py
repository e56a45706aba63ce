"""The asynchronous client for code that is not: an event loop in a thread of its own, shared by all threads that ask."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from s2t.decode.remote.client import Client, RemoteSettings
from s2t.decode.remote.counts import ClientCounts
from s2t.decode.remote.wire import Completion, CompletionRequest
from s2t.workers import waiting

R = TypeVar("R")
T = TypeVar("T")
_END = object()


class BlockingClient:
    """`Client` behind ordinary calls. While a call waits, a worker's turn goes to the next thread (`workers.waiting`)."""

    def __init__(self, settings: RemoteSettings, id_of_text: Callable[[str], int | None] | None = None) -> None:
        self.settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="s2t-remote", daemon=True)
        self._thread.start()
        try:
            self._client = self._wait(_make(settings, id_of_text))
        except BaseException:
            _stop(self._loop, self._thread, None)
            raise
        self._close = weakref.finalize(self, _stop, self._loop, self._thread, self._client)

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and end the thread; what is under way is cancelled."""
        self._close()

    @property
    def counts(self) -> ClientCounts:
        """Calls, retries and tokens so far."""
        return self._client.counts

    def take_counts(self) -> ClientCounts:
        """The counters since this was last called, which start again at zero."""

        async def take(client: Client) -> ClientCounts:
            counts, client.counts = client.counts, ClientCounts()
            return counts

        return self.run(take)

    @property
    def calls_by_server(self) -> dict[str, int]:
        """Answered calls per server."""
        return {server.url: server.calls for server in self._client.servers.all}

    @property
    def is_cut_off(self) -> bool:
        """True while every server is drained."""
        return self._client.is_cut_off

    def complete(self, request: CompletionRequest) -> Completion:
        """One answer; raises RemoteError where no server gives one."""
        return self._wait(self._client.complete(request))

    def complete_all(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """All answers, in order, asked for at once (as many as `max_in_flight` allows)."""
        return self._wait(self._client.complete_all(requests)) if requests else []

    def map(self, requests: Sequence[CompletionRequest], then: Callable[[CompletionRequest, Completion], R]) -> list[R]:
        """`then` of every request and its answer, in order; `then` runs in the client's thread as answers come."""
        return self._wait(self._client.map(requests, then)) if requests else []

    def run(self, work: Callable[[Client], Coroutine[Any, Any, R]]) -> R:
        """What some work with the asynchronous client returns."""
        return self._wait(work(self._client))

    def start(self, work: Callable[[Client], Coroutine[Any, Any, R]]) -> Future[R]:
        """Begin some work with the asynchronous client and return at once; cancelling it ends its requests."""
        return asyncio.run_coroutine_threadsafe(work(self._client), self._loop)

    def models(self) -> list[dict[str, Any]]:
        """What the servers say they serve."""
        return self._wait(self._client.models())

    def model_name(self) -> str:
        """The model's name on the servers."""
        return self._wait(self._client.model_name())

    def stream(self, work: Callable[[Client, Callable[[T], None]], Coroutine[Any, Any, None]]) -> Iterator[T]:
        """What a coroutine hands to its second argument while it runs in the loop, item by item; its error is raised.

        A caller that stops reading ends it.
        """
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        future = asyncio.run_coroutine_threadsafe(work(self._client, items.put), self._loop)
        future.add_done_callback(lambda _: items.put(_END))
        try:
            while True:
                with waiting():
                    item = items.get()
                if item is _END:
                    break
                yield item
            _first_of(future.exception())
        finally:
            future.cancel()

    def _wait(self, work: Coroutine[Any, Any, R]) -> R:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            with waiting():
                return future.result()
        except BaseException:
            future.cancel()
            raise


def _first_of(error: BaseException | None) -> None:
    """Raise an error, or the first one of those that ended a group of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error


async def _make(settings: RemoteSettings, id_of_text: Callable[[str], int | None] | None) -> Client:
    return Client(settings, id_of_text)


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: Client | None) -> None:
    if client is not None:
        asyncio.run_coroutine_threadsafe(_end(client), loop).result(timeout=5.0)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=5.0)
    if not loop.is_running():
        loop.close()


async def _end(client: Client) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.aclose()
