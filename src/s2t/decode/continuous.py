"""The decoding loop fed while it runs: requests join, leave and end at any time, each with settings of its own.

What a request gets does not depend on the others beside it. Knows no text and no clock; whoever steps it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2t.core.sampling import uniforms
from s2t.core.support import logprobs_at, propose
from s2t.decode.batch import Row
from s2t.decode.loop import Decoder, stream_key
from s2t.decode.reference import Reference
from s2t.decode.round import EngineRound
from s2t.decode.steps import StepTexts
from s2t.methods.sample import Sampling
from s2t.methods.strategies import Strategy
from s2t.model.adapter import SelectorReader
from s2t.model.engine import Engine
from s2t.records import Candidates, Request, Step

Likeliest = dict[int, tuple[Candidates, float | None]]
"""Place -> the likeliest tokens there, and criticality where it can be read."""


@dataclass(frozen=True, slots=True)
class OwnRequest(Request):
    """A request with its own sampling (None: greedy) and seed in place of the strategy's; `num_likeliest` asks for readings."""

    sampling: Sampling | None = None
    seed: int = 0
    num_likeliest: int | None = None


@dataclass(frozen=True, slots=True)
class StepReading:
    """The SLM's own distribution at a step: the accepted token's log-probability, and the likeliest tokens, best first.

    Log-probabilities are those of temperature 1, reserved ids left out. `criticality`, in [0, 1], where it can be read.
    """

    logprob: float
    likeliest: Candidates
    criticality: float | None = None


class ContinuousDecoder(Decoder):
    """A Decoder whose requests (`OwnRequest`s) come by `add` and go by `cancel`, between two calls of `round`.

    `max_length` limits prompt and answer together; each request brings its own limit. `readings` holds what steps of requests
    with `num_likeliest` read, by (request index, step index), until it is taken. `reader` reads criticality at their steps.
    """

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        reference: Reference | None,
        max_length: int,
        ends: Callable[[int, int], bool] | None = None,
        reader: SelectorReader | None = None,
        texts: StepTexts | None = None,
    ) -> None:
        super().__init__(engine, strategy, reference, max_length, ends=ends, texts=texts)
        self.readings: dict[tuple[int, int], StepReading] = {}
        self.reader = reader
        self._likeliest: Likeliest = {}  # of the current round
        self.batch.reserve(max_length + strategy.num_candidates + 1)

    @property
    def is_busy(self) -> bool:
        return bool(self.batch.waiting or self.batch.rows)

    def add(self, request: OwnRequest) -> None:
        """Let a request wait for a free row; it enters in the next rounds."""
        self.batch.waiting.append(request)

    def cancel(self, index: int) -> None:
        """Forget a request, waiting or running; its row is free at once, and it yields no further step."""
        self.batch.waiting = deque(request for request in self.batch.waiting if request.index != index)
        self.stop(index)
        self.costs.pop(index, None)

    def round(self) -> list[Step]:
        """One round of the loop: the steps of all running requests, each request's in order."""
        round = self._round()
        for step, place in zip(round.steps, round.taken, strict=True):
            if place in self._likeliest:
                self.readings[step.request, step.index] = _reading(round, place, step.token_id, *self._likeliest[place])
        return round.steps

    # What a request has of its own

    def _draws(self, request: Request, stream: int = 0) -> np.ndarray:
        assert isinstance(request, OwnRequest)
        if request.sampling is None and not self.strategy.trigger.is_random:
            return np.zeros(0)
        length = request.max_new_tokens or self.max_new_tokens
        return uniforms(request.seed, stream_key(request, stream), length)

    def _tokens(self, rows: Sequence[Row], logits: Tensor, greedy: list[int], depth: int = 0) -> list[int]:
        """Greedy tokens and samples; rows with the same filters are sampled together."""
        groups: dict[Sampling, list[int]] = {}
        for place, row in enumerate(rows):
            assert isinstance(row.request, OwnRequest)
            if row.request.sampling is not None:
                groups.setdefault(row.request.sampling, []).append(place)
        tokens = list(greedy)
        for how, places in groups.items():
            draws = self.batch.draws([rows[place] for place in places], [depth] * len(places))
            sampled = how.draw(logits[places].float(), draws)
            for place, token in zip(places, sampled, strict=True):
                tokens[place] = token
        return tokens

    def _fired(self, round: EngineRound) -> list[int]:
        self._likeliest = self._read_likeliest(round)  # before the forward that the states are overwritten by
        return super()._fired(round)

    def _read_likeliest(self, round: EngineRound) -> Likeliest:
        """The likeliest tokens, and criticality, at the places of requests that asked for them."""
        asked = {
            place: row.request.num_likeliest
            for place, row in enumerate(round.rows)
            if isinstance(row.request, OwnRequest) and row.request.num_likeliest is not None
        }
        if not asked:
            return {}
        wanted = list(asked)
        width = min(max(*asked.values(), 1), self.engine.vocab_size)
        ids, logprobs = (found.tolist() for found in propose(round.own_logits[wanted], width))
        criticality: Sequence[float | None] = [None] * len(wanted)
        if self.reader is not None:
            criticality = self.reader.criticality(round.hidden[wanted]).tolist()
        return {
            place: (Candidates(tuple(ids[i][:count]), tuple(logprobs[i][:count])), criticality[i])
            for i, (place, count) in enumerate(asked.items())
        }


def _reading(
    round: EngineRound, place: int, token: int, likeliest: Candidates, criticality: float | None
) -> StepReading:
    if token in likeliest.ids:
        logprob = likeliest.logprobs[likeliest.ids.index(token)]
    else:
        logits = round.own_logits[place : place + 1]
        logprob = float(logprobs_at(logits, torch.tensor([[token]], device=logits.device)))
    return StepReading(logprob, likeliest, criticality)
