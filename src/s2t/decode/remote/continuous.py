"""The decoding loop of an SLM on servers, fed while it runs: requests join and leave at any time, each with limits of its own.

The counterpart of `decode.continuous`; whoever calls `write` says how many run at once, and ends one by cancelling it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from s2t.core.sampling import uniforms
from s2t.decode.continuous import OwnRequest, StepReading
from s2t.decode.remote.blocking import BlockingClient
from s2t.decode.remote.client import Client
from s2t.decode.remote.selector import ServedSelector
from s2t.decode.remote.served import ServedSLM
from s2t.decode.remote.slm import Emit, RemoteDecoder, Writing
from s2t.decode.remote.wire import Completion
from s2t.methods.strategies import Strategy
from s2t.model.loaded import LoadedModel
from s2t.records import Candidates, Request, Step

FIRST_CHUNK, LONGEST_CHUNK = 4, 32
"""Tokens asked for at once of a sequence that somebody watches: as many as are written already, between these."""


class ContinuousRemoteDecoder(RemoteDecoder):
    """A RemoteDecoder whose `OwnRequest`s are written one by one, by `write`.

    Requests with `num_likeliest` leave in `readings`, by (request index, step index), what their steps read until it is taken:
    the SLM's own token with its log-probability, and criticality; `reader` says how criticality is read where it does not
    trigger, None for not at all. Reserved ids share in these log-probabilities, which are the server's.
    """

    def __init__(
        self,
        client: BlockingClient,
        loaded: LoadedModel,
        strategy: Strategy,
        served: ServedSelector | None,
        reader: ServedSelector | None,
        max_length: int,
        ends: Callable[[int, int], bool] | None = None,
    ) -> None:
        super().__init__(client, loaded, strategy, served, max_length, ends=ends)
        self.reader = reader if reader is not None and reader.yes_no is not None else None
        self.readings: dict[tuple[int, int], StepReading] = {}
        self._watched: set[int] = set()

    @classmethod
    def of(
        cls, slm: ServedSLM, strategy: Strategy, max_length: int, ends: Callable[[int, int], bool]
    ) -> ContinuousRemoteDecoder:
        """A decoder of an SLM on servers; `max_length` limits requests without a limit of their own."""
        served = slm.selector if strategy.name == "s2t-local" else None
        return cls(slm.client, slm.loaded, strategy, served, slm.selector, max_length, ends)

    async def write(self, client: Client, request: OwnRequest, emit: Emit, is_watched: bool = False) -> None:
        """Write one request; `emit` gets its steps, soon where it `is_watched`, else when that is cheapest.

        Raises RemoteError where no server answers. Cancelling it ends the server's work, too.
        """
        if is_watched:
            self._watched.add(request.index)
        try:
            await self._write(client, request, emit)
        finally:
            self._watched.discard(request.index)
            self.costs.pop(request.index, None)

    # What a request has of its own

    def _draws(self, request: Request) -> np.ndarray:
        assert isinstance(request, OwnRequest)
        if not self.strategy.trigger.is_random:
            return np.zeros(0)
        return uniforms(request.seed, request.key or str(request.index), self._limit(request))

    def _listed(self, request: Request) -> Sequence[int] | None:
        if self.reader is not None and self._is_read(request):
            return self.reader.yes_no
        return super()._listed(request)

    def _is_read(self, request: Request) -> bool:
        return isinstance(request, OwnRequest) and request.num_likeliest is not None

    def _chunk_length(self, sequence: Writing) -> int:
        length = super()._chunk_length(sequence)
        if sequence.request.index not in self._watched:
            return length
        return min(length, LONGEST_CHUNK, max(FIRST_CHUNK, sequence.steps))

    async def _step(self, client: Client, sequence: Writing, chunk: Completion, place: int) -> Step:
        step = await super()._step(client, sequence, chunk, place)
        if chunk.logprobs and self._is_read(sequence.request):
            listed = chunk.logprobs[place]
            logprob = listed[step.greedy_id]
            criticality = None if self.reader is None else self.reader.criticality(listed)
            found = StepReading(logprob, Candidates((step.greedy_id,), (logprob,)), criticality)
            self.readings[step.request, step.index] = found
        return step
