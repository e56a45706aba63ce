"""Strategy `llm` on servers: whole answers, one request each, as the steps that the decoding loop would have yielded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from s2t.core.rule import finish_reason
from s2t.decode.remote.llm import RemoteLLM
from s2t.decode.remote.wire import Completion, CompletionRequest
from s2t.model.chat import encode
from s2t.records import Cost, Step

if TYPE_CHECKING:
    from s2t.records import Request

_NEVER = -100.0  # the strongest bias a server takes


class RemoteWriter:
    """The LLM alone, greedily; `costs` and `run` as the `Decoder` has them, `ends` as it takes it."""

    def __init__(
        self,
        llm: RemoteLLM,
        max_new_tokens: int,
        ends: Callable[[int, int], bool] | None = None,
        stop: Iterable[str] = (),
    ) -> None:
        self.llm, self.max_new_tokens, self.ends, self.stop = llm, max_new_tokens, ends, list(stop)
        self.costs: dict[int, Cost] = {}

    def run(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Yield every request's steps, request by request, once all answers are there."""
        requests = list(requests)
        extra = self._extra()
        limits = [request.max_new_tokens or self.max_new_tokens for request in requests]
        asked = [
            CompletionRequest(request.prompt_ids, limit, key=str(request.index), extra=extra)
            for request, limit in zip(requests, limits, strict=True)
        ]
        for request, limit, done in zip(requests, limits, self.llm.client.complete_all(asked), strict=True):
            yield from self._steps(request, self._ids(done, limit))

    def _extra(self) -> dict:
        if not self.llm.abilities.speaks_ids:
            return {}
        outline = self.llm.outline
        extra: dict = {
            "stop_token_ids": sorted(outline.stop_ids),
            "logit_bias": {str(i): _NEVER for i in outline.reserved_ids},
        }
        return extra | ({"stop": self.stop, "include_stop_str_in_output": True} if self.stop else {})

    def _ids(self, done: Completion, limit: int) -> list[int]:
        """Generated ids with the stop id at the end; from the text, where a server does not name ids."""
        if done.token_ids:
            return done.token_ids
        ids = encode(self.llm.tokenizer, done.text, add_special_tokens=False)[:limit]
        if done.finish_reason == "stop" or not ids:
            ids.append(min(self.llm.stop_ids))
        return ids

    def _steps(self, request: Request, ids: list[int]) -> Iterator[Step]:
        stops = self.llm.outline.stop_ids
        for index, token in enumerate(ids):
            is_stop = token in stops or (self.ends is not None and self.ends(request.index, token))
            reason = finish_reason(is_stop, index + 1, len(ids))
            if reason is not None:
                self.costs[request.index] = self._cost(len(request.prompt_ids), index + 1)
            yield Step(request.index, index, token, token, finish_reason=reason)
            if reason is not None:
                return

    def _cost(self, prompt: int, generated: int) -> Cost:
        """What the server's model ran: the prompt, then token by token."""
        processed = prompt + generated - 1
        flops = self.llm.outline.flops
        total = flops(processed, processed / 2) if flops is not None else 0.0
        return Cost(generated, slm_forwards=generated, slm_processed=processed, slm_flops=total)
