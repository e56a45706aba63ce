"""Triggers: each reads one number per place, in its own unit, and fires where that passes the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from s2t.config import DecodeConfig
from s2t.core.support import divergence, entropy, in_parts, resolve_support
from s2t.methods.base import Round, Trigger


class Never(Trigger):
    """Plain decoding: reads nothing."""

    name = "never"


class Always(Trigger):
    """Fires at every place, the first ones too; the threshold is left to the selector."""

    name = "always"
    warmup = 0

    def read(self, round: Round) -> Tensor:
        return torch.ones(len(round.num_written))


class Random(Trigger):
    """Fires with a fixed probability; the threshold is that probability."""

    name = "random"
    is_random = True
    fires_below = True

    def read(self, round: Round) -> Tensor:
        return round.draws


class Entropy(Trigger):
    """Entropy of the SLM's next-token distribution, nats."""

    name = "entropy"

    def read(self, round: Round) -> Tensor:
        return in_parts(entropy, round.own_logits)


@dataclass
class Divergence(Trigger):
    """Disagreement of LLM and SLM, nats; reads the LLM at every token. Source: arXiv 2604.26940."""

    support_size: int = 64
    kind: str = "llm-slm"
    support: str = "auto"
    name = "divergence"
    needs = ("llm",)

    @classmethod
    def of(cls, config: DecodeConfig) -> Divergence:
        return cls(config.support_size, config.divergence, config.support)

    def read(self, round: Round) -> Tensor:
        support, size = resolve_support(self.support, self.support_size, self.kind, round.num_listed)
        between = partial(divergence, support_size=size, kind=self.kind, support=support)
        return in_parts(between, round.own_llm_logits(), round.own_logits)


class Criticality(Trigger):
    """The SLM's own estimate, in [0, 1], that the step is a divergence point; no LLM."""

    name = "criticality"
    needs = ("adapter",)

    def read(self, round: Round) -> Tensor:
        return round.adapter.criticality(round.hidden)
