"""The SLM calls for the LLM itself, by a tag in its text: `<call>20</call>` has the LLM write the next 20 tokens.

Decoding alone: the tag comes from a prompt that asks for it, or from an SLM that was trained to write it. Source: RelayLLM,
Huang et al. 2026 (arXiv 2601.05167).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from s2t.methods.base import Round, Trigger

TAG = re.compile(r"<call>\s*(\d{1,6})\s*</call>$")


class Call(Trigger):
    """The tokens that the text has just called for, 0 where it calls for none."""

    name = "call"
    reads_text = True
    default = 0.0
    warmup = 0

    def read(self, round: Round) -> Tensor:
        found = [TAG.search(round.tail(place)) for place in range(len(round.tokens))]
        return torch.tensor([float(call[1]) if call else 0.0 for call in found])

    def hold(self, value: float) -> int:
        return int(value)
