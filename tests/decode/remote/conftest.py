"""A completions server on 127.0.0.1 whose log-probabilities come from a model in this process, and which fails on demand.

It speaks as much of vLLM's API as the client uses, or less of it (`features`), and injects faults by a seeded plan.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

FAULTS = ("429", "500", "timeout", "garbage", "half", "reset", "wrong")
EVERYTHING = frozenset({"prompt_logprobs", "logprob_token_ids", "ids"})


class ModelAnswers:
    """vLLM's replies to completions requests, from uncached forwards of a loaded model in float32."""

    def __init__(self, loaded: Any, features: frozenset[str] = EVERYTHING, max_logprobs: int = 20) -> None:
        self.loaded, self.features, self.max_logprobs = loaded, features, max_logprobs

    @torch.inference_mode()
    def __call__(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        known = {"model", "prompt", "max_tokens", "temperature", "logprobs", "stop", "seed", "logit_bias"}
        known |= self.features | (
            {"return_tokens_as_token_ids", "return_token_ids"} if "ids" in self.features else set()
        )
        known |= {"stop_token_ids"} if "ids" in self.features else set()
        if unknown := sorted(set(body) - known):
            return 400, {"error": {"message": f"unknown fields {unknown}", "code": 400}}
        for name in ("logprobs", "prompt_logprobs"):
            if (body.get(name) or 0) > self.max_logprobs:
                return 400, {"error": {"message": f"{name} is too large", "code": 400}}
        prompt, ids, listed = list(body["prompt"]), [], []
        top, wanted = body.get("logprobs"), body.get("logprob_token_ids")
        bias = {int(i): value for i, value in (body.get("logit_bias") or {}).items()}
        stops = self.loaded.stop_ids | set(body.get("stop_token_ids") or ())
        prompt_rows = None
        reason = "length"
        while len(ids) < body["max_tokens"]:
            logits = self.loaded.model(torch.tensor([[*prompt, *ids]])).logits[0].float()
            if prompt_rows is None:
                prompt_rows = logits.log_softmax(-1)
            last = logits[-1].log_softmax(-1)
            for i, value in bias.items():
                logits[-1, i] += value
            token = int(logits[-1].argmax())
            listed.append(self._listed(last, wanted if wanted else last.topk(top or 1).indices.tolist(), token, False))
            ids.append(token)
            if token in stops:
                reason = "stop"
                break
        choice = {
            "index": 0,
            "text": self.loaded.tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": reason,
            "logprobs": None
            if top is None
            else {"tokens": [self._name(i) for i in ids], "token_logprobs": [], "top_logprobs": listed},
        }
        if "ids" in self.features:
            choice |= {"token_ids": ids}
        if body.get("prompt_logprobs") is not None and prompt_rows is not None:
            rows = [
                {
                    str(i): {"logprob": float(row[i]), "rank": 1}
                    for i in dict.fromkeys([token, *row.topk(body["prompt_logprobs"]).indices.tolist()])
                }
                for row, token in zip(prompt_rows[:-1], prompt[1:], strict=True)
            ]
            choice["prompt_logprobs"] = [None, *rows]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return 200, {"object": "text_completion", "choices": [choice], "usage": usage}

    def _listed(self, row: torch.Tensor, ids: list[int], token: int, _: bool) -> dict[str, float]:
        return {self._name(i): float(row[i]) for i in dict.fromkeys([*ids, token])}

    def _name(self, i: int) -> str:
        return f"token_id:{i}" if "ids" in self.features else self.loaded.tokenizer.decode([i])


class FakeServer:
    """HTTP/1.1 on a free port of 127.0.0.1, in a thread; counts what it answered and what it spoilt."""

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]],
        fault_rate: float = 0.0,
        faults: tuple[str, ...] = FAULTS,
        seed: int = 0,
        delay_s: float = 0.0,
        hang_s: float = 5.0,
        api_key: str | None = None,
        models: tuple[dict[str, Any], ...] = ({"id": "llm"},),
    ) -> None:
        self.answer, self.fault_rate, self.faults, self.delay_s, self.hang_s = (
            answer,
            fault_rate,
            faults,
            delay_s,
            hang_s,
        )
        self.api_key, self.models = api_key, models
        self.random = random.Random(seed)
        self.spoilt: Counter[str] = Counter()
        self.answered = 0
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.is_dead = False
        self.retry_after: str | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
        data = await reader.readexactly(size)
        if self.is_dead:
            return False
        if self.api_key is not None and f"authorization: bearer {self.api_key.lower()}" not in head:
            return await self._reply(writer, 401, {"error": {"message": f"bad key in {head}"}})
        if head.startswith("get"):
            return await self._reply(writer, 200, {"data": list(self.models)})
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._completion(writer, json.loads(data))
        finally:
            self.in_flight -= 1

    async def _completion(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        if self.random.random() < self.fault_rate:
            return await self._spoil(writer, body, self.random.choice(self.faults))
        await asyncio.sleep(self.delay_s)
        self.bodies.append(body)
        self.answered += 1
        return await self._reply(writer, *self.answer(body))

    async def _spoil(self, writer: asyncio.StreamWriter, body: dict[str, Any], fault: str) -> bool:
        self.spoilt[fault] += 1
        if fault in ("429", "500"):
            extra = f"retry-after: {self.retry_after}\r\n" if self.retry_after else ""
            return await self._reply(writer, int(fault), {"error": {"message": "not now"}}, extra)
        if fault == "timeout":
            await asyncio.sleep(self.hang_s)
            return False
        if fault == "garbage":
            return await self._send(writer, 200, b"<html>not json")
        if fault == "wrong":
            return await self._reply(writer, 200, {"choices": []})
        if fault == "half":
            data = json.dumps(self.answer(body)[1]).encode()
            writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data[: len(data) // 2])
            await writer.drain()
        return False

    async def _reply(self, writer: asyncio.StreamWriter, status: int, reply: Any, extra: str = "") -> bool:
        return await self._send(writer, status, json.dumps(reply).encode(), extra)

    async def _send(self, writer: asyncio.StreamWriter, status: int, data: bytes, extra: str = "") -> bool:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{extra}content-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        return True


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """Start servers; all end with the test."""
    servers: list[FakeServer] = []

    def start(answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]], **settings: Any) -> FakeServer:
        servers.append(FakeServer(answer, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def model_answers() -> type[ModelAnswers]:
    return ModelAnswers


def echo(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The sum of the prompt as the next token: an answer that says which request it belongs to."""
    token = sum(body["prompt"])
    logprobs = {"tokens": [f"token_id:{token}"], "top_logprobs": [{f"token_id:{token}": -0.5}]}
    choice = {"text": "x", "finish_reason": "length", "token_ids": [token], "logprobs": logprobs}
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
    return 200, {"choices": [choice], "usage": usage}


@pytest.fixture(scope="session")
def echo_answers() -> Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]:
    return echo
