"""Tokens where nothing triggers (the greedy ones, or samples), and which of several samples answers for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from s2t.core.sampling import filter_logits, sample
from s2t.core.support import self_certainty
from s2t.methods.base import Round, Trigger


@dataclass(frozen=True, slots=True)
class Sampling:
    """Filters of `sample`, `self-consistency` and `self-certainty`; see core.sampling."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0

    def draw(self, logits: Tensor, draws: Tensor) -> list[int]:
        """A token for each row; [n, V], uniforms [n] -> n."""
        return sample(filter_logits(logits, self.temperature, self.top_k, self.top_p, self.min_p), draws).tolist()


class SelfCertainty(Trigger):
    """Never fires; reads how far the next-token distribution is from uniform, KL(U || p) in nats, to rank samples by.

    Source: Kang, Zhao, Song 2025 (arXiv 2502.18581), self-certainty, over the tokens that may be written.
    """

    name = "self-certainty"

    def read(self, round: Round) -> Tensor:
        return self_certainty(round.logits)


def vote(answers: Sequence[str | None]) -> str | None:
    """Majority vote over extracted answers; None (no answer found) never wins over an answer, ties go to the earliest."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None
    most = max(counts.values())
    return next(answer for answer in answers if answer is not None and counts[answer] == most)


def choose_sample(strategy: str, answers: Sequence[str | None], certainties: Sequence[float]) -> int:
    """Which of N samples answers for all: the first one of the majority, or the one the model was surest of."""
    if strategy == "self-certainty":
        return max(range(len(answers)), key=lambda i: certainties[i])
    return answers.index(vote(answers))
