"""Answers over HTTP: as one body or as server-sent events, ended when the client leaves or the time is up.

Whatever happens, the answer is closed, and with it its rows are free.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from s2t.serve.errors import ApiError
from s2t.serve.service import Answer

_LAST_WORDS_S = 1.0
_DONE = b"data: [DONE]\n\n"


class Limit:
    """The seconds that a request may take from its arrival to the end of its answer."""

    def __init__(self, seconds: float, arrived: float | None = None) -> None:
        self.seconds = seconds
        self.until = (time.monotonic() if arrived is None else arrived) + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.until - time.monotonic())


async def respond(answer: Answer, request: Request, limit: Limit) -> Response:
    """The response to one request; takes the answer over, and closes it."""
    if answer.plan.stream:
        return EventStream(answer, limit)
    try:
        body = await first_of(answer.whole(), request.receive, limit)
    finally:
        answer.close()
    return JSONResponse(body) if body is not None else gone()


def gone() -> Response:
    """What is sent to a client that left, and which nobody reads."""
    return Response(status_code=499)


class EventStream(Response):
    """Server-sent events of an answer while it is written."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, limit: Limit) -> None:
        self.answer, self.limit = answer, limit
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers({"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await first_of(self._send(send), receive, self.limit)
            except ApiError as error:
                with contextlib.suppress(TimeoutError):  # of a client that does not read
                    async with asyncio.timeout(_LAST_WORDS_S):
                        await _send_part(send, _event(error.body))
                        await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client left
            pass
        finally:
            self.answer.close()

    async def _send(self, send: Send) -> bool:
        async for part in self._events():
            await _send_part(send, part)
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})
        return True

    async def _events(self) -> AsyncIterator[bytes]:
        writer = self.answer.writer
        is_open = [False] * len(writer.choices)
        async for choice, text, events in self.answer.pieces():
            parts = []
            if not is_open[choice.index] and (first := writer.first(choice)) is not None:
                parts.append(_event(first))
            is_open[choice.index] = True
            if text or choice.finish_reason is not None or self._is_told(events):
                parts.append(_event(writer.chunk(choice, text, events)))
            if parts:
                yield b"".join(parts)
        if self.answer.plan.include_usage:
            yield _event(writer.last())

    def _is_told(self, events: Any) -> bool:
        """True where tokens are reported even if they have shown no text yet."""
        plan = self.answer.plan
        return bool(events) and (plan.num_top is not None or plan.num_candidates is not None)


async def first_of(work: Any, receive: Receive, limit: Limit) -> Any:
    """The result of a coroutine; None where the client leaves first. Raises ApiError when the time is up."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, left}, timeout=limit.left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if left.done():
            return None
        raise ApiError(504, f"the answer was not complete within {limit.seconds:g} s.", code="timeout")
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


def _event(body: Any) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
