"""ZIP-RC: samples whose end is foretold at every few tokens; those that are not worth what they will still cost are stopped.

The samples are those of self-consistency. As with deepconf the stops are judged over finished samples, in step: a stopped one is
charged for its tokens up to there and has no vote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from s2t.config import DecodeConfig
from s2t.errors import ConfigError
from s2t.methods.answers import Answers, Chooser, Known
from s2t.methods.base import Round, Trigger
from s2t.methods.votes import answered, heaviest
from s2t.model.forecast import ForecastHead, load_forecast

EVERY = 8  # tokens between two decisions


@dataclass
class Forecast(Trigger):
    """Never fires; reads the probability, in [0, 1], that the sample ends right, and notes the joint one at every 8th token."""

    head: ForecastHead
    name = "forecast"

    @classmethod
    def of(cls, config: DecodeConfig) -> Forecast:
        if config.forecast is None:
            raise ConfigError("zip-rc needs --forecast, a folder written by `s2t train-router --method zip-rc`.")
        return cls(load_forecast(config.forecast))

    def read(self, round: Round) -> Tensor:
        joint = self.head.read(round.hidden)  # [n, 2, L]
        for place, written in enumerate(round.num_written):
            if written % EVERY == 0:
                round.note(place, joint[place].flatten().tolist())
        return joint[:, 1].sum(-1)


class ZipRC(Chooser):
    """Stops samples by expected utility, E[best reward] - cost x tokens; those left vote with their expected rewards.

    The threshold is the cost of a token, in right answers; 0 stops none. Rewards of different samples are taken as independent.
    Source: Manvi et al. 2025 (arXiv 2512.01457), with a head in the place of reserved logits.
    """

    default = 1e-3

    def __init__(self, config: DecodeConfig, thresholds: Mapping[str, float], known: Known) -> None:
        super().__init__(config, thresholds, known)
        assert config.forecast is not None, "the samples were written with it"
        self.lengths = load_forecast(config.forecast).config.lengths

    def choose(self, question: str, answers: Answers) -> dict[str, Any]:
        whole = answers["forecast"]
        samples = whole["samples"]
        written = stops(samples, self.lengths, self.threshold)
        kept = [one for one, count in zip(samples, written, strict=True) if count == one["tokens"]] or samples[:1]
        share = sum(written) / max(sum(one["tokens"] for one in samples), 1)
        return answered(whole, heaviest(kept, [one["expected"] for one in kept]), share)


def stops(samples: Sequence[Mapping[str, Any]], lengths: Sequence[float], cost: float) -> list[int]:
    """How many tokens of each sample are written; all go on in step, and one at least is never stopped."""
    written = [one["tokens"] for one in samples]
    alive = list(range(len(samples)))
    for decision in range(max(len(one["forecasts"]) for one in samples)):
        joint = {i: samples[i]["forecasts"][decision] for i in alive if decision < len(samples[i]["forecasts"])}
        right = {i: sum(joint[i][len(lengths) :]) if i in joint else samples[i]["expected"] for i in alive}
        while len(alive) > 1 and joint:
            gains = {
                i: gain(joint[i], lengths, cost, math.prod(1 - right[j] for j in alive if j != i))
                for i in reversed(joint)
            }
            worst = min(gains, key=gains.__getitem__)
            if gains[worst] >= 0:
                break
            written[worst] = decision * EVERY
            alive.remove(worst)
            del joint[worst]
    return written


def gain(joint: Sequence[float], lengths: Sequence[float], cost: float, all_others_wrong: float) -> float:
    """What going on with a sample adds to the expected best reward, less its tokens, at the best limit of its length.

    `joint` holds L probabilities of ending wrong after so many tokens, then L of ending right.
    """
    size = len(lengths)
    best, right, spent = -math.inf, 0.0, 0.0
    for place, length in enumerate(lengths):
        ends = joint[place] + joint[size + place]
        right, spent = right + joint[size + place], spent + ends * length
        beyond = max(0.0, 1 - sum(joint[k] + joint[size + k] for k in range(place + 1)))
        tokens = spent + beyond * length
        best = max(best, all_others_wrong * right - cost * tokens)
    return best
