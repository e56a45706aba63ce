"""Which model answers: chosen among finished answers of the SLM (with its confidence) and of the LLM, and paid for accordingly.

Plain arithmetic over graded results, as results.jsonl holds them; nothing is written anew. A problem that goes to the LLM counts
the LLM's tokens as taken over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from s2t.config import DecodeConfig
from s2t.core.support import logprobs_at
from s2t.errors import ConfigError
from s2t.methods.base import Round, Trigger

Answers = Mapping[str, Mapping[str, Any]]
"""One problem's finished results, by strategy."""


class Confidence(Trigger):
    """Never fires; reads the log-probability of the written token, whose mean says how sure the SLM is of an answer."""

    name = "confidence"

    def read(self, round: Round) -> Tensor:
        ids = torch.tensor(round.tokens, device=round.logits.device)[:, None]
        return logprobs_at(round.logits, ids)[:, 0]


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
        return paid(slm, [slm]) if self.score(slm) >= self.threshold else paid(llm, [slm, llm])


def paid(chosen: Mapping[str, Any], run: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A result with the cost of all that ran for it; the LLM's tokens count as triggered."""
    names = run[0]["cost"]
    cost = {name: sum(one["cost"][name] for one in run) for name in names}
    taken = sum(one["cost"]["generated"] for one in run if one["strategy"] == "llm")
    return {**chosen, "cost": cost, "num_triggered": taken, "num_flips": 0, "samples": None, "value": None}
