"""Selectors: what a triggered step takes. Each sees the candidates of the fired places and returns one token for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t.decode.state import State
from s2t.model.adapter import SelectorReader


@dataclass(slots=True)
class Selection:
    """Chosen tokens of the fired places; `index` is -1 where the token is no candidate (takeover)."""

    token_ids: Tensor  # [f]
    index: Tensor  # [f]
    scores: Tensor | None = None  # [f, K]
    llm_probs: Tensor | None = None  # [f, K]


class Selector:
    """Base of all selectors."""

    needs_llm = False
    needs_adapter = False

    def select(self, state: State, places: Sequence[int], ids: Tensor, logprobs: Tensor) -> Selection:
        """Choose for the fired places; ids and logprobs [f, K], best first."""
        raise NotImplementedError


class LLMSelector(Selector):
    """S2T: argmax of p_L over the SLM's candidates. Source: arXiv 2604.26940."""

    needs_llm = True

    def select(self, state: State, places: Sequence[int], ids: Tensor, logprobs: Tensor) -> Selection:
        llm_logprobs = state.llm_logprobs(places, ids, must_order=True)  # [f, K]
        index = llm_logprobs.nan_to_num(nan=float("-inf"), neginf=float("-inf")).argmax(-1)
        return Selection(ids.gather(-1, index[:, None])[:, 0], index, llm_logprobs, llm_logprobs.exp())


class TakeoverSelector(Selector):
    """Takeover: argmax of p_L over the whole vocabulary."""

    needs_llm = True

    def select(self, state: State, places: Sequence[int], ids: Tensor, logprobs: Tensor) -> Selection:
        logits = state.llm_logits(places)
        token_ids = logits.argmax(-1)
        is_candidate = ids == token_ids[:, None]  # [f, K]
        index = torch.where(is_candidate.any(-1), is_candidate.int().argmax(-1), -1)
        return Selection(token_ids, index, llm_probs=state.llm_logprobs(places, ids).exp())


class LocalSelector(Selector):
    """S2T-LOCAL: the SLM scores its own candidates; no LLM. The loop hands it what it reads them from, of one forward."""

    needs_adapter = True

    @torch.inference_mode()
    def read(self, adapter: SelectorReader, hidden: Tensor, ids: Tensor, logprobs: Tensor) -> Selection:
        """Choose by states [f, 1 or K, H] (see `SelectorReader.scores`); ids and logprobs [f, K], best first."""
        scores = adapter.scores(hidden, ids, logprobs)
        scores = scores.masked_fill(logprobs == float("-inf"), float("-inf"))  # reserved ids, when K is near V
        index = scores.argmax(-1)
        return Selection(ids.gather(-1, index[:, None])[:, 0], index, scores)
