"""A trained router: a small network reads the SLM's state, its token and its likeliest logits, and says where the paths part.

Source: R2R, Fu et al. 2025 (arXiv 2505.21600). `s2t train-router` makes one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2t.config import DecodeConfig
from s2t.errors import ConfigError
from s2t.methods.base import Round, Trigger
from s2t.model.router import Router, load_router


@dataclass
class Routed(Trigger):
    """The router's probability, in [0, 1], that the SLM's token would part from the LLM's path for good."""

    router: Router
    name = "router"
    reads_inside = True

    @classmethod
    def of(cls, config: DecodeConfig) -> Routed:
        if config.router is None:
            raise ConfigError(
                "trigger router, which is also that of r2r, needs --router, a folder written by `s2t train-router`."
            )
        found = cls(load_router(config.router))
        found.default = found.router.config.threshold
        return found

    def read(self, round: Round) -> Tensor:
        ids = torch.tensor(round.tokens, device=round.logits.device)
        return self.router.read(round.hidden, round.embed(ids), round.logits)
