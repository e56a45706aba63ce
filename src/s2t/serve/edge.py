"""What stands before the application: the key or the origin, the size and the time of a body, the headers of every answer.

A body is read here, whole and bounded, so that nothing behind it ever waits for a client that sends slowly.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s2t.serve.errors import ApiError, stopping
from s2t.serve.origin import comes_from_here, is_loopback

log = logging.getLogger(__name__)

ARRIVED = "s2t.arrived"
"""Key of the scope: when the request came, by the monotonic clock."""
OPEN_PATHS = frozenset({"/", "/health"})
ASSETS = "/assets/"
BODY_S = 30.0
_LEFT = 499  # the client left
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Edge:
    """ASGI middleware; `observe` is told path, status and seconds of every request.

    Without a key, a server that listens on `host` for this machine alone answers to names of this machine alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        host: str,
        max_body_bytes: int,
        observe: Callable[[str, int, float], None],
    ) -> None:
        self.app, self.max_body_bytes, self.observe = app, max_body_bytes, observe
        self._own = host if key is None and is_loopback(host) else None
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), _LEFT
        scope[ARRIVED] = start

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
            self._check_origin(scope)
            if body is not None:
                await self.app(scope, _replay(body, receive), send_with_headers)
        except ApiError as error:
            await _refuse(error, send_with_headers)
        except Exception:  # whatever a route did not expect
            if status != _LEFT:
                raise
            log.exception("%s failed", scope["path"])
            await _refuse(ApiError(500, "the server failed; its log says why."), send_with_headers)
        except asyncio.CancelledError:  # the server stops, and this client has not sent its body or read its answer
            if status == _LEFT:
                await _refuse(stopping(), send_with_headers)
        finally:
            self.observe(scope["path"], status, time.monotonic() - start)

    def _check_key(self, scope: Scope) -> None:
        """Raise ApiError unless the request brings the key, where one is asked for; compared in constant time."""
        path = scope["path"]
        if self._key is None or path in OPEN_PATHS or path.startswith(ASSETS):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            message = "a valid key is needed: Authorization: Bearer KEY."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _check_origin(self, scope: Scope) -> None:
        """Raise ApiError for what a page from elsewhere sends through a browser of this machine."""
        if self._own is not None and not comes_from_here(scope["headers"], self._own):
            message = (
                "this server answers to this machine alone, as localhost or 127.0.0.1; start it with a key for others."
            )
            raise ApiError(403, message, code="forbidden_host")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client left. Raises ApiError where it is too large or comes too slowly."""
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self.max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {BODY_S:g} s.", headers={"Connection": "close"}
            ) from None

    def _too_large(self) -> ApiError:
        message = f"the body must be at most {self.max_body_bytes} bytes."
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand over a body that was read, then whatever else comes."""
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
