"""Answers chosen among finished ones."""

from __future__ import annotations

import torch
from torch import Tensor

from s2t.core.candidates import logprobs_at
from s2t.methods.base import Round, Trigger


class Confidence(Trigger):
    """Never fires; reads the log-probability of the written token, whose mean says how sure the SLM is of an answer."""

    name = "confidence"

    def read(self, round: Round) -> Tensor:
        ids = torch.tensor(round.tokens, device=round.logits.device)[:, None]
        return logprobs_at(round.logits, ids)[:, 0]

    def fires(self, values: Tensor, threshold: float) -> Tensor:
        return torch.zeros_like(values, dtype=torch.bool)
