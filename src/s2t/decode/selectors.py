"""Selectors: what a triggered step takes. Each sees the candidates of the fired rows and returns one token per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t.decode.state import State, log_softmax_at


@dataclass(slots=True)
class Selection:
    """Chosen tokens of the fired rows; `index` is -1 where the token is no candidate (takeover)."""

    token_ids: Tensor  # [f]
    index: Tensor  # [f]
    scores: Tensor | None = None  # [f, K]
    llm_probs: Tensor | None = None  # [f, K]
    is_kept: bool = False  # the engine already holds the chosen branch
    hidden: Tensor | None = None  # [f, H], the chosen branch's state, when kept


class Selector:
    """Base of all selectors."""

    needs_llm = False
    needs_adapter = False

    def select(self, state: State, rows: Sequence[int], ids: Tensor, logprobs: Tensor) -> Selection:
        """Choose for the fired rows; ids and logprobs [f, K], best first."""
        raise NotImplementedError


class LLMSelector(Selector):
    """S2T: argmax of p_L over the SLM's candidates. Source: arXiv 2604.26940."""

    needs_llm = True

    def select(self, state: State, rows: Sequence[int], ids: Tensor, logprobs: Tensor) -> Selection:
        llm_logprobs = log_softmax_at(state.llm_logits(rows), ids)  # [f, K]
        index = llm_logprobs.argmax(-1)
        return Selection(ids.gather(-1, index[:, None])[:, 0], index, llm_logprobs, llm_logprobs.exp())


class TakeoverSelector(Selector):
    """Takeover: argmax of p_L over the whole vocabulary."""

    needs_llm = True

    def select(self, state: State, rows: Sequence[int], ids: Tensor, logprobs: Tensor) -> Selection:
        logits = state.llm_logits(rows)
        token_ids = logits.argmax(-1)
        is_candidate = ids == token_ids[:, None]  # [f, K]
        index = torch.where(is_candidate.any(-1), is_candidate.int().argmax(-1), -1)
        return Selection(token_ids, index, llm_probs=log_softmax_at(logits, ids).exp())


class LocalSelector(Selector):
    """S2T-LOCAL: the SLM scores its own candidates in one tree step; no LLM.

    Under adapter scope `always` the winner's branch stays in the cache and replaces the ordinary step; under
    `candidates` the branch was made by the adapter and is dropped.
    """

    needs_adapter = True

    def select(self, state: State, rows: Sequence[int], ids: Tensor, logprobs: Tensor) -> Selection:
        engine = state.engine
        adapter = engine.adapter
        assert adapter is not None, "s2t-local is read from an adapter"
        hidden = engine.branch(rows, ids)  # [f, K, H]
        with torch.inference_mode():
            scores = adapter.scores(hidden, logprobs)
            scores = scores.masked_fill(logprobs == float("-inf"), float("-inf"))  # reserved ids, when K is near V
        index = scores.argmax(-1)
        selection = Selection(ids.gather(-1, index[:, None])[:, 0], index, scores)
        if adapter.scope == "always":
            engine.accept(rows, index)
            selection.is_kept = True
            selection.hidden = hidden[torch.arange(len(rows), device=hidden.device), index]
        return selection
