"""Steps as the report's token trace shows them: texts, what triggered and flipped, candidates with both models' probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from s2t.decode.label import Labels
from s2t.errors import ModelError
from s2t.model.text import TextCodec
from s2t.records import Step


class TokenTexts:
    """The texts of tokens, each decoded once; what is no whole character is shown as bytes, `\\xe4\\xbd`.

    A character cut over several tokens stands, whole, at the last of them: `pending` is what its earlier tokens left.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._parts: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def text(self, token_id: int, pending: bytes = b"") -> str:
        """The token's text behind such bytes."""
        if token_id not in self._texts:
            self._texts[token_id] = self._read(token_id)
        part = self._parts.get(token_id)
        if part is None:
            return self._texts[token_id]
        rest = _unfinished(pending + part)
        if rest is None:  # they do not go together
            return self._texts[token_id]
        own = rest[-len(part) :]
        return (pending + part).removesuffix(rest).decode() + own.decode(errors="backslashreplace")

    def pending(self, token_id: int, pending: bytes = b"") -> bytes:
        """The bytes of the character that is unfinished behind the token."""
        self.text(token_id)
        part = self._parts.get(token_id)
        return b"" if part is None else _unfinished(pending + part) or b""

    def _read(self, token_id: int) -> str:
        text = str(self.tokenizer.decode([token_id]))
        if "\ufffd" not in text or self._codec is None:
            return text
        data = self._codec.bytes_of[token_id] or b""
        try:
            data.decode()
        except UnicodeDecodeError:
            self._parts[token_id] = data
            return data.decode(errors="backslashreplace")
        return text

    @cached_property
    def _codec(self) -> TextCodec | None:
        try:
            return TextCodec(self.tokenizer)
        except ModelError:  # a slow tokenizer does not say what its tokens' bytes are
            return None


def _unfinished(data: bytes) -> bytes | None:
    """The beginning of a character that UTF-8 ends in, empty where it ends in a whole one; None for what is no UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data[error.start :] if error.reason == "unexpected end of data" else None
    return b""


def trace_steps(texts: TokenTexts, steps: Sequence[Step], labels: Labels | None = None) -> list[dict[str, Any]]:
    """The steps of an answer as the trace page shows them."""
    found, pending = [], b""
    for step in steps:
        found.append(trace_step(texts, step, labels, pending))
        pending = texts.pending(step.token_id, pending)
    return found


def trace_step(texts: TokenTexts, step: Step, labels: Labels | None = None, pending: bytes = b"") -> dict[str, Any]:
    """A step as the trace page shows it, behind the bytes of an unfinished character; what is false or not known is left out.

    Candidates stand where the step triggered and, with `labels`, where the LLM would have written another token than
    the SLM's greedy one.
    """
    found: dict[str, Any] = {"token_id": step.token_id, "text": texts.text(step.token_id, pending)}
    if step.greedy_id != step.token_id:
        found |= {"greedy_id": step.greedy_id, "greedy_text": texts.text(step.greedy_id, pending)}
    found |= {key: True for key, is_so in (("fired", step.fired), ("flip", step.flip and step.fired)) if is_so}
    if step.value is not None:
        found["value"] = _short(step.value)
    if labels is not None:
        found["divergence"] = _short(labels.divergence[step.index])
    if candidates := _trace_candidates(texts, step, labels, pending):
        found["candidates"] = candidates
    return found


def _trace_candidates(texts: TokenTexts, step: Step, labels: Labels | None, pending: bytes) -> list[dict[str, Any]]:
    llm: dict[int, float | None] = {}
    ids, logprobs = (step.candidates.ids, step.candidates.logprobs) if step.candidates is not None else ((), ())
    if labels is not None:
        row = labels.candidate_ids[step.index].tolist()
        llm = dict(zip(row, labels.llm_probs[step.index].tolist(), strict=True))
        if not ids and labels.rank[step.index] > 0:
            ids, logprobs = row, labels.slm_logprobs[step.index].tolist()
    if step.llm_probs is not None:
        llm = dict(zip(ids, step.llm_probs, strict=True))
    scores = step.scores or (None,) * len(ids)
    return [
        {
            "id": token_id,
            "text": texts.text(token_id, pending),
            "slm_prob": _short(np.exp(logprob)),
            "llm_prob": _short(llm.get(token_id)),
            "score": _short(score),
            "selected": token_id == step.token_id,
        }
        for token_id, logprob, score in zip(ids, logprobs, scores, strict=True)
    ]


def _short(value: float | None) -> float | None:
    """Four significant digits: enough to look at."""
    return None if value is None else float(f"{value:.4g}")
