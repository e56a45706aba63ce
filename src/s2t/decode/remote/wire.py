"""The wire format of a completions API: a request as a JSON body, and a reply as token ids and log-probabilities.

Prompts are token ids, never text. Servers that name tokens by text instead of id need `id_of_text`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LogProbs = dict[int, float]
"""Token id -> log-probability (nats), of the tokens a server listed at one position."""
_PLACEHOLDER = "token_id:"
_FLOOR = -9999.0  # what servers write for minus infinity


class BadReply(Exception):
    """A reply with status 200 that is not what was asked for; the request is made again."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One call: greedy unless `extra` says otherwise.

    `logprobs` lists that many likeliest tokens per generated token, `prompt_logprobs` per prompt token, and
    `logprob_token_ids` these very ids per generated token in place of the likeliest. `model` goes before the client's own
    (the name of a LoRA, say). Requests of one `key` go to one server while it is not much busier than the others, since
    it has their prefix cached. `extra` is merged into the body as it is. Of the prompt's log-probabilities those of the
    first `num_prompt_skipped` tokens are not read. `more_prompts` are asked for in the same call (`Client.complete_rows`).
    `fresh` makes what else goes into the body, anew for each attempt.
    """

    prompt_ids: Sequence[int]
    max_tokens: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    model: str | None = None
    key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    num_prompt_skipped: int = 0
    more_prompts: Sequence[Sequence[int]] = ()
    fresh: Callable[[], Mapping[str, Any]] | None = None

    def body(self, model: str, speaks_ids: bool = True) -> dict[str, Any]:
        """The JSON body; `speaks_ids` asks for token ids in the reply, which vLLM understands and others may refuse."""
        body: dict[str, Any] = {
            "model": self.model or model,
            "prompt": [list(self.prompt_ids), *map(list, self.more_prompts)]
            if self.more_prompts
            else list(self.prompt_ids),
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
        }
        if speaks_ids:
            body |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
        if self.logprobs is not None:
            body["logprobs"] = self.logprobs
        if self.prompt_logprobs is not None:
            body["prompt_logprobs"] = self.prompt_logprobs
        if self.logprob_token_ids is not None:
            body |= {"logprobs": self.logprobs or 1, "logprob_token_ids": list(self.logprob_token_ids)}
        return body | dict(self.extra) | dict(self.fresh() if self.fresh is not None else {})


@dataclass(slots=True)
class Completion:
    """What a server wrote. T generated tokens, P prompt tokens."""

    token_ids: list[int]
    """[T]; empty where the server names neither ids nor log-probabilities."""
    logprobs: list[LogProbs]
    """[T] listed tokens at each generated token; empty unless asked for."""
    prompt_logprobs: list[LogProbs | None]
    """[P] listed tokens at each prompt token, the first one None; empty unless asked for."""
    text: str
    finish_reason: str
    usage: Mapping[str, Any] | None = None
    stop_reason: int | str | None = None


def parse_completion(
    reply: Any, request: CompletionRequest, id_of_text: Callable[[str], int | None] | None = None
) -> Completion:
    """Read a reply; raises BadReply where it is not an answer to the request."""
    try:
        return _parse(reply, request, id_of_text)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadReply(f"{type(error).__name__}: {str(error)[:100]}") from error


def parse_rows(
    reply: Any, request: CompletionRequest, id_of_text: Callable[[str], int | None] | None = None
) -> list[Completion]:
    """Read the answers to all prompts of a request, in order; raises BadReply where one is missing."""
    try:
        choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
        if len(choices) != 1 + len(request.more_prompts):
            raise BadReply(f"{len(choices)} answers to {1 + len(request.more_prompts)} prompts")
        return [_parse(reply, request, id_of_text, choice) for choice in choices]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadReply(f"{type(error).__name__}: {str(error)[:100]}") from error


def _parse(
    reply: Any, request: CompletionRequest, id_of_text: Callable[[str], int | None] | None, choice: Any = None
) -> Completion:
    choice = reply["choices"][0] if choice is None else choice
    found = choice.get("logprobs") or {}
    content = found.get("content")
    if content is not None:  # the chat shape, which some servers use for completions as well
        listed = [_of_content(item, id_of_text) for item in content]
        ids = [_token_id(item, id_of_text) for item in content]
    else:
        listed = [_of_mapping(each or {}, id_of_text) for each in found.get("top_logprobs") or []]
        ids = [_id_of(token, id_of_text) for token in found.get("tokens") or []]
    token_ids = choice.get("token_ids")
    ids = [int(i) for i in token_ids] if token_ids is not None else [i for i in ids if i is not None]
    prompt = choice.get("prompt_logprobs", reply.get("prompt_logprobs")) or []
    done = Completion(
        ids,
        listed,
        [_of_prompt(each) if place >= request.num_prompt_skipped else None for place, each in enumerate(prompt)],
        str(choice.get("text") or ""),
        str(choice.get("finish_reason") or ""),
        reply.get("usage"),
        choice.get("stop_reason"),
    )
    wants = request.logprobs is not None or request.logprob_token_ids is not None
    if wants and not listed and (ids or request.max_tokens == 1):
        raise BadReply("no log-probabilities in the reply")
    if request.prompt_logprobs is not None and len(prompt) != len(request.prompt_ids):
        raise BadReply(f"log-probabilities of {len(prompt)} prompt tokens, expected {len(request.prompt_ids)}")
    if request.logprob_token_ids is not None and any(set(request.logprob_token_ids) - each.keys() for each in listed):
        raise BadReply("listed ids are missing from the log-probabilities")
    return done


def _of_prompt(listed: Mapping[str, Mapping[str, float]] | None) -> LogProbs | None:
    return None if listed is None else {int(i): _logprob(float(at["logprob"])) for i, at in listed.items()}


def _of_mapping(listed: Mapping[str, float], id_of_text: Callable[[str], int | None] | None) -> LogProbs:
    pairs = ((_id_of(token, id_of_text), float(value)) for token, value in listed.items())
    return {i: _logprob(value) for i, value in pairs if i is not None}


def _of_content(item: Mapping[str, Any], id_of_text: Callable[[str], int | None] | None) -> LogProbs:
    pairs = ((_token_id(each, id_of_text), float(each["logprob"])) for each in item.get("top_logprobs") or [item])
    return {i: _logprob(value) for i, value in pairs if i is not None}


def _token_id(item: Mapping[str, Any], id_of_text: Callable[[str], int | None] | None) -> int | None:
    return int(item["id"]) if "id" in item else _id_of(item["token"], id_of_text)


def _id_of(token: str, id_of_text: Callable[[str], int | None] | None) -> int | None:
    if token.startswith(_PLACEHOLDER):
        return int(token.removeprefix(_PLACEHOLDER))
    return id_of_text(token) if id_of_text is not None else None


def _logprob(value: float) -> float:
    return float("-inf") if value <= _FLOOR else value
