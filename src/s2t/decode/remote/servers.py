"""Several servers that hold the same model: who takes the next request, who is out of order, and who is back.

A server that fails several times in a row is drained: it gets no requests, those it holds are made again elsewhere, and
it is asked for its models now and then until it answers. Knows no wire format.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2t.errors import RemoteError

FAILURES_TO_DRAIN = 4  # in a row
_FIRST_CHECK_S, _LAST_CHECK_S = 0.5, 15.0
_LEAN = 8  # requests that a server with the prefix in its cache may hold more than the idlest one


@dataclass(slots=True, eq=False)
class Server:
    """One base URL and how it is doing."""

    url: str
    in_flight: int = 0
    failures: int = 0  # in a row
    relapses: int = 0  # drained so often since it last answered
    is_drained: bool = False
    last_error: str = ""
    calls: int = 0
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


class Servers:
    """Picks servers and watches over them; lives in one event loop."""

    def __init__(
        self,
        urls: Sequence[str],
        is_well: Callable[[str], Awaitable[bool]],
        patience_s: float,
        on_drain: Callable[[str], None],
    ) -> None:
        self.all = [Server(url) for url in urls]
        self._is_well, self._patience_s, self._on_drain = is_well, patience_s, on_drain
        self._some_well = asyncio.Event()
        self._some_well.set()
        self._checks: set[asyncio.Task[None]] = set()

    async def pick(self, key: str | None = None) -> Server:
        """The server with the fewest requests in flight; for a key the one that had it before, unless much busier.

        Waits while all are drained; raises RemoteError when none came back in `patience_s`.
        """
        while not (well := [server for server in self.all if not server.is_drained]):
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._some_well.wait()
            except TimeoutError:
                raise self._none_left() from None
        fewest = min(well, key=lambda server: server.in_flight)
        if key is None or len(well) == 1:
            return fewest
        own = max(well, key=lambda server: zlib.crc32(f"{server.url} {key}".encode()))
        return own if own.in_flight <= fewest.in_flight + _LEAN else fewest

    def note_success(self, server: Server) -> None:
        """A request was answered."""
        server.calls += 1
        server.failures = server.relapses = 0

    def note_failure(self, server: Server, error: str) -> None:
        """A request failed in a way that may be the server's fault."""
        server.failures += 1
        server.last_error = error
        if server.failures >= FAILURES_TO_DRAIN and not server.is_drained:
            self._drain(server)

    async def close(self) -> None:
        """End the health checks."""
        for task in self._checks:
            task.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)

    def _drain(self, server: Server) -> None:
        server.is_drained = True
        self._on_drain(server.url)
        if all(other.is_drained for other in self.all):
            self._some_well.clear()
        else:
            for task in server.tasks:
                task.cancel()  # made again elsewhere
        check = asyncio.get_running_loop().create_task(self._bring_back(server))
        self._checks.add(check)
        check.add_done_callback(self._checks.discard)

    async def _bring_back(self, server: Server) -> None:
        wait = min(_LAST_CHECK_S, _FIRST_CHECK_S * 2**server.relapses)
        server.relapses += 1
        await asyncio.sleep(wait)
        while not await self._is_well(server.url):
            wait = min(_LAST_CHECK_S, wait * 2)
            await asyncio.sleep(wait)
        server.is_drained, server.failures = False, 0
        self._some_well.set()

    def _none_left(self) -> RemoteError:
        states = "; ".join(f"{server.url}: {server.last_error}" for server in self.all)
        return RemoteError(
            f"no server has answered for {self._patience_s:.0f} s ({states}); start one and rerun, which resumes."
        )
