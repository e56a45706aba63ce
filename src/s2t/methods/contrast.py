"""Decoders that contrast two distributions: of two models, of one model with and without context, of one model's layers.

Each takes the best token of a difference of logits at every step; `--threshold` is the method's own knob.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from s2t.config import DecodeConfig
from s2t.methods.base import Proposal, Round, Selection, Selector


@dataclass
class _Contrast(Selector):
    """The best token of a contrast; `strength` is the setting `threshold`, or the method's default."""

    strength: float
    default: ClassVar[float]

    @classmethod
    def of(cls, config: DecodeConfig) -> _Contrast:
        return cls(cls.default if config.threshold is None else config.threshold)

    def choose(self, round: Round, fired: Sequence[int], candidates: Proposal) -> Selection:
        contrast = self.contrast(round, list(fired))  # [f, V]
        token_ids = contrast.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argmax(-1)
        return Selection.of_tokens(candidates, token_ids)

    def contrast(self, round: Round, places: list[int]) -> Tensor:
        """What is compared, at some places; [f, V]."""
        raise NotImplementedError


class Contrastive(_Contrast):
    """log p_L - log p_S where p_L >= alpha max p_L. Source: Li et al. 2023 (arXiv 2210.15097). alpha = 1 is the LLM."""

    default = 0.1

    def contrast(self, round: Round, places: list[int]) -> Tensor:
        llm = round.llm_logits(places).log_softmax(-1)
        return among_likely(llm - round.logits[places].log_softmax(-1), llm, self.strength)


class ContextAware(_Contrast):
    """(1 + alpha) with - alpha without context. Source: Shi et al. 2024 (arXiv 2305.14739). alpha = 0 is greedy.

    The context is the prompt but for its last sentence; the SLM reads the answer behind both.
    """

    default = 0.5

    def contrast(self, round: Round, places: list[int]) -> Tensor:
        return (1 + self.strength) * round.logits[places] - self.strength * round.llm_logits(places)


class DoLa(_Contrast):
    """The last layer against that earlier layer of which it differs most, among tokens of p >= alpha max. alpha = 1 is greedy.

    Source: Chuang et al. 2024 (arXiv 2309.03883), upper half of the layers, each row for itself. How two layers differ is what
    their release and transformers 4.55 compute, which is not quite the paper's JS: KL from the mean of both to each of them.
    """

    default = 0.1
    layers = "high"

    def contrast(self, round: Round, places: list[int]) -> Tensor:
        last = round.logits[places].log_softmax(-1)  # [f, V]
        earlier = round.layer_logits(places).log_softmax(-1)  # [L, f, V]
        middle = 0.5 * (last.exp() + earlier.exp())
        apart = _divergence_from(middle, last) + _divergence_from(middle, earlier)  # [L, f]
        chosen = earlier[apart.argmax(0), torch.arange(len(places), device=last.device)]  # [f, V]
        return among_likely(last - chosen, last, self.strength)


def _divergence_from(probs: Tensor, logprobs: Tensor) -> Tensor:
    """KL of probabilities from log-probabilities, of whatever size; [L, f, V], [..., V] -> [L, f]."""
    terms = probs * (probs.clamp_min(1e-38).log() - logprobs)
    return torch.where(probs > 0, terms, torch.zeros_like(terms)).sum(-1)


def among_likely(values: Tensor, logprobs: Tensor, alpha: float) -> Tensor:
    """Values where p >= alpha max p, -inf elsewhere; [f, V]. An alpha of 0 keeps every token that may be written."""
    floor = logprobs.max(-1, keepdim=True).values + (math.log(alpha) if alpha > 0 else -math.inf)
    return values.masked_fill((logprobs < floor) | (logprobs == -math.inf), -math.inf)
