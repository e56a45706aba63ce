"""Who writes a step of the text: a step that the SLM wrote is judged whole, or its first token says who writes it.

A step that is not kept is written by the LLM, to its end; see the span of `s2t.decode.round`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2t.core.support import entropy, logprobs_at
from s2t.methods.base import Round, Trigger

QUESTION = "\n(Is the last step right? From 0, wrong, to 9, right:) "
DIGITS = tuple("0123456789")


class _Step(Trigger):
    by_step = reads_text = True
    warmup = 0


class StepScore(_Step):
    """The LLM's mark for the step that the SLM wrote, 0 to 9, in one token; fires below the threshold.

    Source: SpecReason, Pan et al. 2025 (arXiv 2504.07891), which keeps steps from 7 on.
    """

    name = "step-score"
    needs = ("llm",)
    drafts_steps = True
    fires_below = True
    default = 7.0

    def read(self, round: Round) -> Tensor:
        drafts, held = round.drafts, round.held
        judged = [i for i, places in enumerate(drafts) if not held[places[0]]]
        values = torch.zeros(len(round.tokens))
        if judged:
            marks = round.ask(judged, QUESTION, DIGITS).argmax(-1).tolist()
            for i, mark in zip(judged, marks, strict=True):
                values[drafts[i]] = float(mark)
        return values


class StepConfidence(_Step):
    """The mean probability of the SLM's tokens in the step; fires below the threshold.

    Source: SMART, Kim et al. 2025 (arXiv 2504.09923), whose score may be a reward model's as well.
    """

    name = "step-confidence"
    drafts_steps = True
    fires_below = True
    default = 0.9

    def read(self, round: Round) -> Tensor:
        ids = torch.tensor(round.tokens, device=round.logits.device)[:, None]
        probs = logprobs_at(round.logits, ids)[:, 0].exp()  # [n]
        values = torch.zeros_like(probs)
        for places in round.drafts:
            values[places] = probs[places].mean()
        return values


class StepEntropy(_Step):
    """The SLM's entropy at a step's first token, nats, and -1 at the others.

    Source: GlimpRouter, Zeng et al. 2026 (arXiv 2601.05110).
    """

    name = "step-entropy"
    default = 1.0

    def read(self, round: Round) -> Tensor:
        values = entropy(round.logits)
        return torch.where(torch.tensor(round.starts, device=values.device), values, -1.0)
