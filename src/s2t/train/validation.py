"""What held-out groups say of a selector: when it is best, how much weight it earns, where criticality triggers.

Groups are held out by problem, so that no prefix of theirs was trained on. Knows readings and labels, no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2t.core.losses import listwise_cross_entropy
from s2t.core.stats import sign_flip_p_value
from s2t.train.dataset import Trajectory

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHANCE = 0.05
Combine = Callable[[Tensor, Tensor, float], Tensor]
"""Readings [N, K], log p_S [N, K] and the adapter's weight -> scores [N, K]."""


def split_by_problem(trajectories: Sequence[Trajectory], share: float) -> tuple[list[int], list[int]]:
    """Places of the trajectories to train on and of those held out: about `share` of the problems, by a hash of their ids.

    All trajectories of a problem fall on one side. At least one problem is trained on.
    """
    kept = [i for i, t in enumerate(trajectories) if _fraction(t.problem_id) >= share]
    if not kept:
        kept = [i for i, t in enumerate(trajectories) if t.problem_id == trajectories[0].problem_id]
    training = set(kept)
    return kept, [i for i in range(len(trajectories)) if i not in training]


def _fraction(problem_id: str) -> float:
    digest = hashlib.blake2b(f"held out {problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Readings of all held-out groups, and of criticality at all their trajectories' steps.

    Under readout `rank` the groups are divergence points and as many steps that merely look like some, where the SLM's first
    choice is the right one: a selector that flips for nothing pays for it.
    """

    readings: Tensor  # [N, K], what the adapter alone says
    slm_logprobs: Tensor  # [N, K]
    llm_probs: Tensor  # [N, K]
    criticality: np.ndarray  # [M]
    is_critical: np.ndarray  # [M] bool
    problems: np.ndarray  # [N] str, whose group each is

    def quality(self, combine: Combine, weight: float) -> dict[str, float]:
        """NLL (nats: cross-entropy of p_L over the candidates) and agreement with the LLM's choice, at a weight."""
        scores = combine(self.readings, self.slm_logprobs, weight)
        return {
            "nll": float(listwise_cross_entropy(scores, self.llm_probs)),
            "agreement": float(self._agrees(scores).float().mean()),
        }

    def _agrees(self, scores: Tensor) -> Tensor:
        return scores.argmax(-1) == self.llm_probs.argmax(-1)  # [N]

    def slm(self) -> dict[str, float]:
        """The same of the SLM's own order."""
        return self.quality(lambda _, logprobs, weight: logprobs, 0.0)

    def best_weight(self, combine: Combine) -> float:
        """The weight of least NLL among those that do better than the SLM's own order; 0 where there is none.

        Better is a lower NLL, and agreeing with the LLM more often by more than chance explains: signs of the problems' gains
        are flipped, since groups of one problem are alike, and p has to be below `CHANCE`. A selector that is only surer than the
        SLM, and no more often right, does harm.
        """
        found = {weight: self.quality(combine, weight) for weight in WEIGHTS[1:]}
        slm = self.slm()
        better = [
            weight
            for weight, one in found.items()
            if one["nll"] < slm["nll"]
            and one["agreement"] > slm["agreement"]
            and sign_flip_p_value(self._gains(combine, weight)) < CHANCE
        ]
        return min(better, key=lambda weight: found[weight]["nll"], default=0.0)

    def _gains(self, combine: Combine, weight: float) -> np.ndarray:
        """Of how many more groups than the SLM's own order a weight takes the LLM's choice, by problem."""
        scores = combine(self.readings, self.slm_logprobs, weight)
        gains = self._agrees(scores).int() - self._agrees(self.slm_logprobs).int()  # [N]
        _, place = np.unique(self.problems, return_inverse=True)
        return np.bincount(place, gains.cpu().numpy())

    def threshold(self) -> float:
        """The criticality that as many steps pass as are divergence points."""
        return float(np.quantile(self.criticality, 1 - self.is_critical.mean()))

    def average_precision(self) -> float | None:
        """Of criticality against the divergence points; None where all steps are alike."""
        if self.is_critical.all() or not self.is_critical.any():
            return None
        from sklearn.metrics import average_precision_score

        return float(average_precision_score(self.is_critical, self.criticality))

    def report(self, combine: Combine, weight: float, threshold: float) -> dict[str, Any]:
        """What `train.json` and the model card say of the held-out groups."""
        return {
            "num_groups": len(self.readings),
            "slm": self.slm(),
            "adapter": self.quality(combine, 1.0),
            "adapter_weight": weight,
            "chosen": self.quality(combine, weight),
            "divergence_rate": float(self.is_critical.mean()),
            "trigger_rate": float((self.criticality > threshold).mean()),
            "criticality_average_precision": self.average_precision(),
        }

    @staticmethod
    def joined(parts: Sequence[HeldOut]) -> HeldOut:
        """Several parts as one."""
        return HeldOut(
            torch.cat([part.readings for part in parts]),
            torch.cat([part.slm_logprobs for part in parts]),
            torch.cat([part.llm_probs for part in parts]),
            np.concatenate([part.criticality for part in parts]),
            np.concatenate([part.is_critical for part in parts]),
            np.concatenate([part.problems for part in parts]),
        )
