"""An asynchronous client of OpenAI-compatible completions APIs: bounded, balanced over servers, retried, counted.

A request is a pure function of its body, so that making it again loses and doubles nothing. Keys never reach a log or an
error. `blocking` wraps it for code that is not asynchronous.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from s2t.decode.remote.counts import ClientCounts, Prices
from s2t.decode.remote.servers import Server, Servers
from s2t.decode.remote.wire import BadReply, Completion, CompletionRequest, parse_completion, parse_rows
from s2t.errors import ConfigError, RemoteError, missing_extra

R = TypeVar("R")
_RETRIED = {408, 409, 425, 429}  # and 5xx
_NOT_ITS_FAULT = {"429", "drained"}  # causes that do not count against a server
_CONNECT_S = 10.0
_CHECK_S = 5.0
_TRIES = 4
_REFUSED = {400, 422}  # statuses that servers use for what they cannot do
_MAX_REPLY_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """Where the servers are and how patiently they are asked. `urls` are base URLs that end in /v1, usually."""

    urls: tuple[str, ...]
    model: str | None = None
    """Name under which the servers know the model; None takes the one they serve."""
    api_key: str | None = field(default=None, repr=False)
    max_in_flight: int = 128
    """Requests under way at any time, over all servers."""
    timeout_s: float = 120.0
    """For one attempt, from the first byte sent to the last one read."""
    max_retries: int = 10
    backoff_s: float = 0.25
    """Before the first retry; doubles with each further one, with jitter."""
    max_backoff_s: float = 30.0
    patience_s: float = 300.0
    """How long to wait for a server when all have failed."""
    prices: Prices = field(default_factory=Prices)
    speaks_ids: bool = True
    """Ask for token ids in replies (vLLM); other servers may refuse the fields."""

    def __post_init__(self) -> None:
        if not self.urls:
            raise ConfigError("a remote model needs the URL of a server, such as http://127.0.0.1:8000/v1.")
        for url in self.urls:
            check_url(url)
        check_key(self.api_key, "the server's key")


def check_url(url: str) -> None:
    """Raise ConfigError for what is no base URL of a server."""
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that are none
        parts, is_sound = None, False
    if "@" in url or (parts is not None and parts.query):
        raise ConfigError("a server's URL must not hold a key; put the key into an environment variable.")
    if not is_sound:
        raise ConfigError(f"a server's URL must look like http://127.0.0.1:8000/v1; got {url!r}.")


def api_key_from(variable: str | None) -> str | None:
    """The key in an environment variable; None where it is not set or empty; ConfigError for what no header can hold."""
    key = (os.environ.get(variable) or "").strip() if variable else ""
    check_key(key, f"the key in {variable}")
    return key or None


def check_key(key: str | None, name: str) -> None:
    """Raise ConfigError, without showing it, for a key that no header can hold."""
    if any(not "!" <= letter <= "~" for letter in key or ""):
        raise ConfigError(f"{name} must be printable ASCII without spaces; got something else; set it again.")


class _Failed(Exception):
    """An attempt that may be made again."""

    def __init__(self, cause: str, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.cause, self.retry_after_s = cause, retry_after_s


class Client:
    """Asks servers for completions. Use inside one event loop, as an asynchronous context manager."""

    def __init__(self, settings: RemoteSettings, id_of_text: Callable[[str], int | None] | None = None) -> None:
        try:
            import httpx
        except ImportError as error:
            raise missing_extra("httpx", "remote") from error
        self.settings, self.counts, self.id_of_text = settings, ClientCounts(), id_of_text
        self._httpx = httpx
        self._headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        self._tls = httpx.create_ssl_context()
        self._lanes: list[Any] = []
        self._idle: list[Any] = []
        room = settings.max_in_flight
        self._room = asyncio.Semaphore(room)
        self.servers = Servers(
            [url.rstrip("/") for url in settings.urls], self._is_well, settings.patience_s, self._note_drained
        )
        self._random = random.Random()
        self.speaks_ids = settings.speaks_ids
        self._model: str | None = settings.model
        self._naming = asyncio.Lock()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End health checks and close connections."""
        await self.servers.close()
        for lane in self._lanes:
            await lane.aclose()

    async def complete(self, request: CompletionRequest) -> Completion:
        """The answer to one request, retried until it is one; raises RemoteError where no server gives one."""
        body = partial(request.body, await self.model_name(), self.speaks_ids)
        done = await self._ask(
            "completions", body, lambda reply: parse_completion(reply, request, self.id_of_text), request.key
        )
        self.counts.add(done.usage)
        return done

    async def complete_rows(self, request: CompletionRequest) -> list[Completion]:
        """The answers to all prompts of one request, in order; retried and counted as one call."""
        body = partial(request.body, await self.model_name(), self.speaks_ids)
        done = await self._ask(
            "completions", body, lambda reply: parse_rows(reply, request, self.id_of_text), request.key
        )
        self.counts.add(done[0].usage)
        return done

    async def complete_all(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """All answers, in order; the first error ends the others."""
        return await self.map(requests, lambda _, done: done)

    async def map(
        self, requests: Sequence[CompletionRequest], then: Callable[[CompletionRequest, Completion], R]
    ) -> list[R]:
        """`then` of every request and its answer, in order, each applied as soon as the answer is there."""

        async def one(request: CompletionRequest) -> R:
            return then(request, await self.complete(request))

        tasks = [asyncio.ensure_future(one(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def try_once(self, url: str, body: dict[str, Any]) -> Any:
        """The JSON that one server answers to a body, None where it refuses it; raises RemoteError where it cannot be reached.

        For finding out what a server can do: neither balanced nor counted.
        """
        for attempt in range(1, _TRIES + 1):
            try:
                return await self._send(f"{url}/completions", body)
            except RemoteError as error:
                if error.status not in _REFUSED:
                    raise
                return None
            except _Failed as failed:
                if attempt == _TRIES and failed.cause == "5xx":
                    return None  # how some servers say that they do not know a field
                if attempt == _TRIES:
                    raise RemoteError(
                        f"{url} cannot be asked: {failed.cause}, {failed}; start it and rerun."
                    ) from failed
                await asyncio.sleep(self._pause(attempt, failed))

    async def models(self) -> list[dict[str, Any]]:
        """What the servers say they serve (/models of one of them)."""
        reply = await self._ask("models", None, _model_list, None)
        return reply

    async def model_name(self) -> str:
        """The name of the model: the one set, else the only one that is served; adapters do not count."""
        if self._model is None:
            async with self._naming:
                if self._model is None:
                    self._model = _only_model(await self.models())
        return self._model

    # One request

    async def _ask(
        self, path: str, body: Callable[[], dict[str, Any]] | None, read: Callable[[Any], R], key: str | None
    ) -> R:
        """Attempts until `read` accepts a reply; the place among the requests in flight is free between attempts.

        `body` is made anew for each attempt.
        """
        attempt = 0
        while True:
            async with self._room:
                server = await self.servers.pick(key)
                server.in_flight += 1
                try:
                    found = await self._attempt(server, path, None if body is None else body(), read)
                    self.servers.note_success(server)
                    return found
                except _Failed as failed:
                    failure = failed
                    if failed.cause not in _NOT_ITS_FAULT:
                        self.servers.note_failure(server, f"{failed.cause}, {failed}")
                finally:
                    server.in_flight -= 1
            attempt += failure.cause != "drained"
            if attempt > self.settings.max_retries:
                break
            self.counts.retries[failure.cause] += 1
            await asyncio.sleep(self._pause(attempt, failure))
        raise RemoteError(
            f"{server.url}/{path} failed {attempt} times, at last with {failure.cause} ({failure}); "
            "look at the server, or raise --timeout-s or --max-retries, and rerun, which resumes."
        )

    async def _attempt(self, server: Server, path: str, body: dict[str, Any] | None, read: Callable[[Any], R]) -> R:
        task = asyncio.ensure_future(self._send(f"{server.url}/{path}", body))
        server.tasks.add(task)
        try:
            return read(await task)
        except BadReply as error:
            raise _Failed("bad reply", str(error)) from error
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if server.is_drained and current is not None and not current.cancelling():
                raise _Failed("drained", "its server keeps failing") from None
            task.cancel()
            raise
        finally:
            server.tasks.discard(task)

    async def _send(self, url: str, body: dict[str, Any] | None) -> Any:
        """One exchange; returns the JSON of a reply with status 200, raises _Failed for what may be tried again."""
        httpx = self._httpx
        try:
            async with asyncio.timeout(self.settings.timeout_s), self._lane() as lane:
                call = lane.stream("GET", url) if body is None else lane.stream("POST", url, json=body)
                async with call as response:
                    data = await _read(response)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise _Failed("timeout", f"no answer in {self.settings.timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise _Failed("connection", f"{type(error).__name__} {self._clean(str(error))}".strip()) from error
        if response.status_code != 200:
            self._refuse(url, response, data)
        try:
            return json.loads(data)
        except ValueError as error:  # no JSON, or no UTF-8
            raise _Failed("bad reply", "not JSON") from error

    @asynccontextmanager
    async def _lane(self) -> AsyncIterator[Any]:
        """An HTTP client for one exchange at a time, with its connections kept alive for the next one.

        One for all would go through every connection for every other, at each request: most of the time at 64 in flight.
        """
        lane = self._idle.pop() if self._idle else self._new_lane()
        try:
            yield lane
        finally:
            self._idle.append(lane)

    def _new_lane(self) -> Any:
        connect_s = min(_CONNECT_S, self.settings.timeout_s)
        timeout = self._httpx.Timeout(self.settings.timeout_s, connect=connect_s, pool=None)
        self._lanes.append(self._httpx.AsyncClient(headers=self._headers, timeout=timeout, verify=self._tls))
        return self._lanes[-1]

    def _refuse(self, url: str, response: Any, data: bytes) -> None:
        """Raise for a reply with another status than 200: _Failed where a retry may help, else RemoteError."""
        status = response.status_code
        reason = self._clean(_reason(data))
        if status >= 500 or status in _RETRIED:
            cause = str(status) if status < 500 else "5xx"
            raise _Failed(cause, f"HTTP {status} {reason}".strip(), _retry_after_s(response.headers.get("retry-after")))
        if status in (401, 403):
            raise RemoteError(
                f"{url} refused the request (HTTP {status}); put a valid key into the variable that --llm-api-key-env names.",
                status,
            )
        hint = "check the URL (does it end in /v1?) and the model's name" if status == 404 else "check the request"
        raise RemoteError(f"{url} answered HTTP {status}: {reason or 'no reason given'}; {hint}.", status)

    def _pause(self, attempt: int, failure: _Failed) -> float:
        """Seconds before the next attempt: what the server asks for, else exponential with full jitter; none if drained."""
        if failure.cause == "drained":
            return 0.0
        ceiling = min(self.settings.max_backoff_s, self.settings.backoff_s * 2 ** (attempt - 1))
        pause = self._random.uniform(ceiling / 2, ceiling)
        return max(pause, min(failure.retry_after_s, self.settings.max_backoff_s) * self._random.uniform(1.0, 1.1))

    def _clean(self, text: str) -> str:
        """A server's words on one line, bounded, without the key it may have echoed."""
        key = self.settings.api_key
        if key:
            text = text.replace(key, "***")
        return " ".join(text.split())[:200]

    # Health

    async def is_well(self) -> bool:
        """Whether any server answers now."""
        return any(await asyncio.gather(*(self._is_well(server.url) for server in self.servers.all)))

    @property
    def is_cut_off(self) -> bool:
        """True while every server is drained."""
        return all(server.is_drained for server in self.servers.all)

    async def _is_well(self, url: str) -> bool:
        httpx = self._httpx
        try:
            async with asyncio.timeout(_CHECK_S), self._lane() as lane:
                response = await lane.get(f"{url}/models")
            _model_list(response.json())
        except (httpx.HTTPError, TimeoutError, ValueError, BadReply):
            return False
        return response.status_code == 200

    def _note_drained(self, url: str) -> None:
        self.counts.drained[url] += 1


def _model_list(reply: Any) -> list[dict[str, Any]]:
    found = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, dict) and "id" in each for each in found):
        raise BadReply("no list of models")
    return found


def _only_model(models: Sequence[dict[str, Any]]) -> str:
    names = [str(each["id"]) for each in models if not each.get("parent")]
    if len(names) != 1:
        shown = ", ".join(names) or "none"
        raise ConfigError(f"the server must serve one model, or be asked for one; it serves {shown}; pass --llm-model.")
    return names[0]


async def _read(response: Any) -> bytes:
    """The body of a reply, of a bounded size."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > _MAX_REPLY_BYTES:
            raise _Failed("bad reply", f"more than {_MAX_REPLY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _reason(data: bytes) -> str:
    """The message of an error reply, in the shapes that servers use."""
    try:
        body = json.loads(data)
    except ValueError:
        return data[:200].decode(errors="replace")
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _retry_after_s(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 for none or nonsense."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (at - datetime.now(UTC)).total_seconds()) if at.tzinfo else 0.0
