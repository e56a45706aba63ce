"""Triggers of no method's own: each reads one number per place, in its own unit, and fires where that passes the threshold.

Divergence and criticality stand with the method, in `methods.select`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2t.core.support import entropy, in_parts
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
