"""Which of N samples answers for all, by more than a majority: votes weighted by rank or by confidence, and stopped early.

Over the samples of `self-certainty`, each with the model's mean certainty; nothing is written anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from s2t.methods.answers import Answers, Chooser


class Borda(Chooser):
    """A Borda vote: the r-th surest of N samples has (N - r + 1)^p votes; p, the threshold, of 0 is a majority.

    Source: Kang, Zhao, Song 2025 (arXiv 2502.18581).
    """

    default = 0.5

    def choose(self, question: str, answers: Answers) -> dict[str, Any]:
        whole = answers["self-certainty"]
        samples = whole["samples"]
        order = sorted(range(len(samples)), key=lambda i: -samples[i]["certainty"])
        weights = {i: (len(samples) - rank) ** self.threshold for rank, i in enumerate(order)}
        return answered(whole, heaviest(samples, [weights[i] for i in range(len(samples))]), 1.0)


class DeepConf(Chooser):
    """Votes weighted by certainty among the surest nine in ten samples, stopped once one answer has the share `threshold`.

    A threshold of 1 or more never stops. The first two samples are always drawn; a stopped vote costs its share of the tokens.
    Source: Fu et al. 2025 (arXiv 2508.15260), with the certainty of whole samples in the place of their groups'.
    """

    default = 0.95
    kept, fewest = 0.9, 2

    def choose(self, question: str, answers: Answers) -> dict[str, Any]:
        whole = answers["self-certainty"]
        samples = whole["samples"]
        for count in range(self.fewest, len(samples) + 1):
            found = self._vote(samples[:count])
            share = sum(found[0].values()) and max(found[0].values()) / sum(found[0].values())
            if share >= self.threshold or count == len(samples):
                tokens = sum(sample["tokens"] for sample in samples[:count])
                return answered(whole, found[1], tokens / max(sum(sample["tokens"] for sample in samples), 1))
        return answered(whole, samples[0], 1.0)

    def _vote(self, samples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], Mapping[str, Any]]:
        ranked = sorted((sample["certainty"] for sample in samples), reverse=True)
        least = ranked[max(1, round(self.kept * len(samples))) - 1]  # as sure as that is sure enough
        weights = [sample["certainty"] if sample["certainty"] >= least else 0.0 for sample in samples]
        return tally(samples, weights), heaviest(samples, weights)


def tally(samples: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, float]:
    """The votes of each answer; samples without an answer have none."""
    votes: dict[str, float] = defaultdict(float)
    for sample, weight in zip(samples, weights, strict=True):
        if sample["answer"] is not None:
            votes[sample["answer"]] += weight
    return dict(votes)


def heaviest(samples: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> Mapping[str, Any]:
    """The first sample of the answer with most votes, ties to the earliest; the first sample where none has an answer."""
    votes = tally(samples, weights)
    best = max(votes.values(), default=0.0)
    return next((one for one in samples if one["answer"] is not None and votes[one["answer"]] == best), samples[0])


def answered(whole: Mapping[str, Any], sample: Mapping[str, Any], share: float) -> dict[str, Any]:
    """One sample's answer as the result of all, with a share of their cost."""
    cost = {name: type(value)(value * share) for name, value in whole["cost"].items()}
    own = {"is_correct": sample["is_correct"], "extracted": sample["answer"], "samples": None, "text": ""}
    return {**whole, **own, "cost": cost}
