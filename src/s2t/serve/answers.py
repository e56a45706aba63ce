"""Written tokens become answers: text, log-probabilities, details and usage, in the shapes of the OpenAI API.

Knows the wire format and tokenizers; neither sockets nor models.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from s2t.errors import ModelError
from s2t.model.stops import StoppingText
from s2t.model.text import TextCodec
from s2t.serve import schema
from s2t.serve.backend import Job, WrittenToken
from s2t.serve.intake import Plan

_LOWEST = -9999.0  # stands for minus infinity, as in the OpenAI API


class WireTokens:
    """What single tokens are on the wire: their text, or what they are called, and their bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _codec(self) -> TextCodec | None:
        try:
            return TextCodec(self.tokenizer)
        except ModelError:  # a slow tokenizer: its tokens have names only
            return None

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes a token stands for; None for a special one."""
        return None if self._codec is None else self._codec.bytes_of[token_id]

    def num_chars(self, token_id: int) -> int:
        """Characters that begin in the token: none in a special one, which the text of an answer leaves out."""
        return sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(token_id) or b"")

    def text(self, token_id: int) -> str:
        """The token's text; `bytes:\\xe2\\x82` where it is a part of a character, its name where it is a special token."""
        data = self.bytes_of(token_id)
        if data is None:
            return str(self.tokenizer.convert_ids_to_tokens(token_id))
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of an answer while it is written."""

    index: int
    job: Job
    text: StoppingText
    stop_ids: frozenset[int]
    finish_reason: str | None = None
    num_tokens: int = 0
    num_triggered: int = 0
    num_flips: int = 0
    offset: int = 0  # characters of the tokens reported so far
    _held: list[tuple[int, WrittenToken]] = field(
        default_factory=list
    )  # tokens whose text is not shown yet, and where it begins
    _num_shown: int = 0  # characters

    def push(self, events: Sequence[WrittenToken]) -> tuple[str, list[WrittenToken]]:
        """Take tokens; returns the text that became certain, and its tokens: none that ended it, and none of a stop string."""
        pieces, kept = [], []
        for event in events:
            step, piece = event.step, ""
            self.num_tokens += 1
            self.num_triggered += step.fired
            self.num_flips += step.fired and step.flip
            self.finish_reason = step.finish_reason
            if step.finish_reason != "stop" or step.token_id not in self.stop_ids:
                self._held.append((self.text.num_read, event))
                piece = self.text.push(step.token_id)
            if step.finish_reason is not None:
                piece += self.text.finish()
            pieces.append(piece)
            kept += self._shown(len(piece))
        return "".join(pieces), kept

    def _shown(self, length: int) -> list[WrittenToken]:
        """Take the tokens of what is shown by now, so many characters more than before."""
        self._num_shown += length
        is_whole = not self.text.is_over and (self.finish_reason is not None or not self.text.stops)
        count = sum(is_whole or start < self._num_shown for start, _ in self._held)
        taken, self._held = self._held[:count], self._held[count:]
        return [event for _, event in taken]


@dataclass
class Writer:
    """Makes the bodies of one answer; a subclass per endpoint knows their shapes."""

    plan: Plan
    choices: list[Choice]
    tokens: WireTokens
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> schema.Usage:
        written = sum(choice.num_tokens for choice in self.choices)
        prompt = self.plan.num_prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def answer(self, texts: Sequence[str], events: Sequence[Sequence[WrittenToken]]) -> Any:
        """The whole body, from the text and the tokens of each choice."""
        raise NotImplementedError

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk that opens a choice, where there is one."""
        raise NotImplementedError

    def chunk(self, choice: Choice, text: str, events: Sequence[WrittenToken]) -> dict[str, Any]:
        """A chunk of a choice's text and tokens, or of its end."""
        raise NotImplementedError

    def last(self) -> dict[str, Any]:
        """The chunk with the usage."""
        return {**self._head(), "choices": [], "usage": self.usage}

    def _head(self) -> dict[str, Any]:
        raise NotImplementedError

    def _envelope(self, prefix: str, kind: str) -> dict[str, Any]:
        how: schema.Written = {"strategy": self.plan.strategy, "seed": self.plan.seed}
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.plan.model,
            "s2t": how,
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(), "choices": [choice]} | ({"usage": None} if self.plan.include_usage else {})

    def _extension(self, events: Sequence[WrittenToken]) -> dict[str, schema.Details]:
        """The details as a field of a choice, where they were asked for."""
        if self.plan.num_candidates is None:
            return {}
        return {"s2t": {"steps": [self._step(event, self.plan.num_candidates) for event in events]}}

    def _step(self, event: WrittenToken, num_candidates: int) -> schema.TokenDetails:
        step, reading = event.step, event.reading
        return {
            "token": self.tokens.text(step.token_id),
            "token_id": step.token_id,
            "greedy": self.tokens.text(step.greedy_id),
            "value": step.value,
            "criticality": None if reading is None else reading.criticality,
            "fired": step.fired,
            "flip": step.flip,
            "candidates": self._candidates(event, num_candidates),
        }

    def _candidates(self, event: WrittenToken, count: int) -> list[schema.Candidate]:
        """Those the selector chose from, else the likeliest tokens."""
        step = event.step
        offered = step.candidates or (event.reading.likeliest if event.reading is not None else None)
        if offered is None:
            return []
        scores: Sequence[float | None] = step.scores or [None] * len(offered.ids)
        llm_probs: Sequence[float | None] = step.llm_probs or [None] * len(offered.ids)
        rows = zip(offered.ids, offered.logprobs, scores, llm_probs, strict=True)
        return [
            {
                "token": self.tokens.text(token_id),
                "token_id": token_id,
                "logprob": max(logprob, _LOWEST),
                "score": None if score is None else max(score, _LOWEST),
                "llm_prob": llm_prob,
                "selected": token_id == step.token_id,
            }
            for token_id, logprob, score, llm_prob in list(rows)[:count]
        ]

    def _likeliest(self, event: WrittenToken) -> list[tuple[int, float]]:
        assert event.reading is not None
        found = event.reading.likeliest
        pairs = zip(found.ids, found.logprobs, strict=True)
        return [(token_id, max(logprob, _LOWEST)) for token_id, logprob in pairs][: self.plan.num_top]


class ChatWriter(Writer):
    """Bodies of /v1/chat/completions."""

    def _head(self) -> dict[str, Any]:
        return self._envelope("chatcmpl", "chat.completion.chunk")

    def answer(self, texts: Sequence[str], events: Sequence[Sequence[WrittenToken]]) -> Any:
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(kept),
                "finish_reason": choice.finish_reason,
                **self._extension(kept),
            }
            for choice, text, kept in zip(self.choices, texts, events, strict=True)
        ]
        return {**self._envelope("chatcmpl", "chat.completion"), "choices": choices, "usage": self.usage}

    def first(self, choice: Choice) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})

    def chunk(self, choice: Choice, text: str, events: Sequence[WrittenToken]) -> dict[str, Any]:
        return self._chunk(
            {
                "index": choice.index,
                "delta": {"content": text} if text else {},
                "logprobs": self._logprobs(events),
                "finish_reason": choice.finish_reason,
                **self._extension(events),
            }
        )

    def _logprobs(self, events: Sequence[WrittenToken]) -> schema.ChatLogprobs | None:
        if self.plan.num_top is None:
            return None
        return {"content": [self._logprob(event) for event in events], "refusal": None}

    def _logprob(self, event: WrittenToken) -> schema.TokenLogprob:
        assert event.reading is not None
        top = [self._top(token_id, logprob) for token_id, logprob in self._likeliest(event)]
        return {**self._top(event.step.token_id, max(event.reading.logprob, _LOWEST)), "top_logprobs": top}

    def _top(self, token_id: int, logprob: float) -> schema.TopLogprob:
        data = self.tokens.bytes_of(token_id)
        return {
            "token": self.tokens.text(token_id),
            "logprob": logprob,
            "bytes": None if data is None else list(data),
        }


class TextWriter(Writer):
    """Bodies of /v1/completions."""

    def _head(self) -> dict[str, Any]:
        return self._envelope("cmpl", "text_completion")

    def answer(self, texts: Sequence[str], events: Sequence[Sequence[WrittenToken]]) -> Any:
        choices = [
            {
                "index": choice.index,
                "text": text,
                "logprobs": self._logprobs(choice, kept),
                "finish_reason": choice.finish_reason,
                **self._extension(kept),
            }
            for choice, text, kept in zip(self.choices, texts, events, strict=True)
        ]
        return {**self._head(), "choices": choices, "usage": self.usage}

    def first(self, choice: Choice) -> None:
        return None

    def chunk(self, choice: Choice, text: str, events: Sequence[WrittenToken]) -> dict[str, Any]:
        return self._chunk(
            {
                "index": choice.index,
                "text": text,
                "logprobs": self._logprobs(choice, events),
                "finish_reason": choice.finish_reason,
                **self._extension(events),
            }
        )

    def _logprobs(self, choice: Choice, events: Sequence[WrittenToken]) -> schema.TextLogprobs | None:
        if self.plan.num_top is None:
            return None
        found: schema.TextLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for event in events:
            assert event.reading is not None
            text = self.tokens.text(event.step.token_id)
            found["tokens"].append(text)
            found["token_logprobs"].append(max(event.reading.logprob, _LOWEST))
            found["top_logprobs"].append({self.tokens.text(i): logprob for i, logprob in self._likeliest(event)})
            found["text_offset"].append(choice.offset)
            choice.offset += self.tokens.num_chars(event.step.token_id)
        return found
