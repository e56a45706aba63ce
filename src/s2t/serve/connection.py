"""HTTP connections whose requests must say what they want in time: a head that is half sent does not hold a connection for ever.

Uvicorn's own limits begin with a whole head, or with the end of an answer; this one covers what comes before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def timed_protocol(on_slow: Callable[[], None]) -> type[H11Protocol]:
    """The protocol of a server whose connections get `HEAD_S` seconds for the head of a request; `on_slow` counts the others."""

    class TimedProtocol(H11Protocol):
        """As uvicorn's, with a clock that runs while the head of a request is waited for."""

        _clock: asyncio.TimerHandle | None = None
        _has_begun = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._clock = self.loop.call_later(HEAD_S, self._give_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._has_begun = self.conn.their_state is h11.IDLE  # or the head is whole, or no HTTP
            if not self._has_begun:
                self._stop_clock()
            elif self._clock is None:  # of a connection that was kept alive
                self._clock = self.loop.call_later(HEAD_S, self._give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            super().connection_lost(exc)

        def _stop_clock(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

        def _give_up(self) -> None:
            self._clock = None
            if self.transport.is_closing():
                return
            if self._has_begun:
                on_slow()
                self.transport.write(_TOO_SLOW)
            self.transport.close()

    return TimedProtocol
