"""Speculative sampling: the SLM drafts samples, the LLM keeps or redraws them, and the answer is distributed as the LLM's own.

A drafted x is kept with probability min(1, p_L(x) / p_S(x)), else redrawn from (p_L - p_S)+; both under the same filters. Draft,
acceptance and redraw each have uniforms of their own. Source: Chen et al. 2023 (arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2t.config import DecodeConfig
from s2t.core.sampling import filter_logits, sample
from s2t.methods.base import Proposal, Round, Selection, Selector, Trigger

ACCEPT, REDRAW = 1, 2  # streams of uniforms; the draft has stream 0


@dataclass(frozen=True)
class Filters:
    """Temperature, top-k, top-p and min-p, for both models alike."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, config: DecodeConfig) -> Filters:
        return cls(config.temperature, config.top_k, config.top_p, config.min_p)

    def probs(self, logits: Tensor) -> Tensor:
        """[n, V] -> [n, V], float64."""
        return filter_logits(logits, self.temperature, self.top_k, self.top_p, self.min_p).double().softmax(-1)


@dataclass
class Rejected(Trigger):
    """u - p_L(x) / p_S(x) of the drafted token x, u uniform: rejected from 0 on. A threshold of 1 keeps every draft."""

    filters: Filters
    name = "rejection"
    needs = ("llm",)
    default = 0.0
    warmup = 0

    @classmethod
    def of(cls, config: DecodeConfig) -> Rejected:
        return cls(Filters.of(config))

    def read(self, round: Round) -> Tensor:
        drafted = torch.tensor(round.tokens, device=round.logits.device)[:, None]  # [n, 1]
        llm, slm = (self.filters.probs(logits).gather(-1, drafted) for logits in (round.llm_logits(), round.logits))
        return round.uniforms(ACCEPT) - (llm / slm)[:, 0]

    def fires(self, values: Any, threshold: float) -> Any:
        return values >= threshold


@dataclass
class Residual(Selector):
    """A sample of (p_L - p_S)+."""

    filters: Filters

    @classmethod
    def of(cls, config: DecodeConfig) -> Residual:
        return cls(Filters.of(config))

    def lacks(self, num_listed: int) -> str | None:
        if 0 < self.filters.top_k <= num_listed:
            return None
        return (
            f"strategy speculative needs the LLM's whole distribution, and a server tells its {num_listed} likeliest tokens; "
            f"pass --top-k {num_listed} or fewer, or run the LLM in this process."
        )

    def choose(self, round: Round, fired: Sequence[int], candidates: Proposal) -> Selection:
        places = list(fired)
        llm, slm = self.filters.probs(round.llm_logits(fired)), self.filters.probs(round.logits[places])
        rest = (llm - slm).clamp_min(0.0)  # [f, V]
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, llm)  # equal up to rounding
        token_ids = sample(rest.log(), round.uniforms(REDRAW)[places])
        return Selection.of_tokens(candidates, token_ids, round.llm_logprobs(fired, candidates.ids).exp())
