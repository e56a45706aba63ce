"""Which model answers: chosen among finished answers of the SLM (with its confidence) and of the LLM, and paid for accordingly.

Plain arithmetic over graded results, as results.jsonl holds them; nothing is written anew. A problem that goes to the LLM counts
the LLM's tokens as taken over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from s2t.config import DecodeConfig
from s2t.core.candidates import logprobs_at
from s2t.errors import ConfigError
from s2t.methods.base import Round, Trigger

Answers = Mapping[str, Mapping[str, Any]]
"""One problem's finished results, by strategy."""
NUM_NEIGHBOURS = 16


class Confidence(Trigger):
    """Never fires; reads the log-probability of the written token, whose mean says how sure the SLM is of an answer."""

    name = "confidence"

    def read(self, round: Round) -> Tensor:
        ids = torch.tensor(round.tokens, device=round.logits.device)[:, None]
        return logprobs_at(round.logits, ids)[:, 0]

    def fires(self, values: Tensor, threshold: float) -> Tensor:
        return torch.zeros_like(values, dtype=torch.bool)


@dataclass(frozen=True)
class Known:
    """What is known of other problems: their questions and graded answers. Only for methods that learn."""

    questions: Sequence[str] = ()
    answers: Sequence[Answers] = ()


class Chooser:
    """Chooses one answer for a problem; `default` is its threshold where none is given."""

    default: ClassVar[float]
    learns: ClassVar[bool] = False
    reads: ClassVar[str] = ""
    """Of a calibration file: whose threshold it takes."""

    def __init__(self, config: DecodeConfig, thresholds: Mapping[str, float], known: Known) -> None:
        own = config.threshold if config.threshold is not None else thresholds.get(self.reads)
        self.threshold = self.default if own is None else own
        if self.learns:
            if not known.answers:
                raise ConfigError(
                    "frugalgpt and knn-routing learn from other problems; pass --known, a finished run of `s2t eval "
                    "--strategies confidence,llm --split calibration`."
                )
            self.learn(known)

    def learn(self, known: Known) -> None:
        """Learn from finished answers of other problems."""

    def choose(self, question: str, answers: Answers) -> dict[str, Any]:
        """The answer and its cost, as a result."""
        raise NotImplementedError


class Cascade(Chooser):
    """The LLM answers where the SLM's mean log-probability is below the threshold; both are paid for then.

    Source: Varshney and Baral 2022 (arXiv 2210.05528).
    """

    default = -0.05
    reads = "confidence"

    def score(self, answer: Mapping[str, Any]) -> float:
        """How sure one may be of the SLM's answer."""
        return answer["value"]

    def choose(self, question: str, answers: Answers) -> dict[str, Any]:
        slm, llm = answers["confidence"], answers["llm"]
        return _paid(slm, [slm]) if self.score(slm) >= self.threshold else _paid(llm, [slm, llm])


class FrugalGPT(Cascade):
    """A cascade whose score is learned: logistic regression of being right on confidence, length and whether there is an answer.

    Source: Chen, Zaharia, Zou 2023 (arXiv 2305.05176), with two models and a scorer of our own features.
    """

    default = 0.5
    reads = "frugalgpt"
    learns = True

    def learn(self, known: Known) -> None:
        rows = np.array([_features(answers["confidence"]) for answers in known.answers])
        right = np.array([float(answers["confidence"]["is_correct"]) for answers in known.answers])
        self.mean, self.scale = rows.mean(0), rows.std(0) + 1e-9
        self.weights = logistic(np.c_[np.ones(len(rows)), (rows - self.mean) / self.scale], right)

    def score(self, answer: Mapping[str, Any]) -> float:
        row = np.r_[1.0, (_features(answer) - self.mean) / self.scale]
        return float(1 / (1 + math.exp(-float(row @ self.weights))))


class NearestNeighbours(Chooser):
    """The model is chosen before it writes: the LLM where it was right so much more often on the K most similar known questions.

    Source: Shnitzer et al. 2023 (arXiv 2309.15789), kNN on questions; similarity is the cosine of words weighted by rarity.
    """

    default = 0.0
    reads = "knn-routing"
    learns = True
    num_neighbours = NUM_NEIGHBOURS

    def learn(self, known: Known) -> None:
        documents = [Counter(question.lower().split()) for question in known.questions]
        seen = Counter(word for words in documents for word in words)
        self.rarity = {word: math.log(len(documents) / count) + 1 for word, count in seen.items()}
        self.vectors = [self._vector(words) for words in documents]
        self.gains = np.array(
            [float(a["llm"]["is_correct"]) - float(a["confidence"]["is_correct"]) for a in known.answers]
        )

    def gain(self, question: str) -> float:
        """How much more often the LLM was right on the most similar questions."""
        own = self._vector(Counter(question.lower().split()))
        alike = np.array([sum(own[word] * other.get(word, 0.0) for word in own) for other in self.vectors])
        return float(self.gains[np.argsort(-alike, kind="stable")[: self.num_neighbours]].mean())

    def choose(self, question: str, answers: Answers) -> dict[str, Any]:
        chosen = answers["llm" if self.gain(question) > self.threshold else "confidence"]
        return _paid(chosen, [chosen])

    def _vector(self, words: Mapping[str, int]) -> dict[str, float]:
        weighted = {word: count * self.rarity.get(word, 0.0) for word, count in words.items()}
        size = math.sqrt(sum(value**2 for value in weighted.values())) or 1.0
        return {word: value / size for word, value in weighted.items()}


def logistic(rows: np.ndarray, right: np.ndarray, ridge: float = 1.0, num_steps: int = 25) -> np.ndarray:
    """Weights of a logistic regression by Newton's method, with a ridge on all but the first; [n, d], [n] -> [d]."""
    weights, penalty = np.zeros(rows.shape[1]), np.diag([1e-6, *[ridge] * (rows.shape[1] - 1)])
    for _ in range(num_steps):
        probs = 1 / (1 + np.exp(-np.clip(rows @ weights, -30, 30)))
        slope = rows.T @ (probs - right) + penalty @ weights
        curve = (rows * (probs * (1 - probs))[:, None]).T @ rows + penalty
        weights = weights - np.linalg.solve(curve, slope)
    return weights


def _features(answer: Mapping[str, Any]) -> np.ndarray:
    return np.array([answer["value"], math.log1p(answer["cost"]["generated"]), float(answer["extracted"] is not None)])


def _paid(chosen: Mapping[str, Any], run: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A result with the cost of all that ran for it; the LLM's tokens count as triggered."""
    names = run[0]["cost"]
    cost = {name: sum(one["cost"][name] for one in run) for name in names}
    taken = sum(one["cost"]["generated"] for one in run if one["strategy"] == "llm")
    return {**chosen, "cost": cost, "num_triggered": taken, "num_flips": 0, "samples": None, "value": None}
