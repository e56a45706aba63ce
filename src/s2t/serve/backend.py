"""What writes tokens behind the server: the `Backend` interface, and the in-process engine as its implementation.

A backend is used by one thread alone. It gets jobs, is stepped while it is busy, and says what was written since; requests,
sockets and text are none of its business.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from s2t.decode.continuous import ContinuousDecoder, OwnRequest, StepReading
from s2t.decode.pair import Pair, as_read
from s2t.methods.strategies import Strategy
from s2t.model.stops import Stops
from s2t.records import Step

log = logging.getLogger("s2t.serve")

PLAIN = ("greedy", "sample")  # one decoder serves both


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One sequence to write; `request.index` is its number in this process."""

    strategy: str
    request: OwnRequest
    stops: tuple[str, ...] = ()
    is_streamed: bool = False


@dataclass(frozen=True, slots=True)
class WrittenToken:
    """One token of a job, and what was read at its step where the job asked for it."""

    job: Job
    step: Step
    reading: StepReading | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that ended without an answer, and why, as an HTTP status and in words for the client."""

    job: Job
    message: str
    status: int = 500


Event = WrittenToken | Failed


class Backend(Protocol):
    """Writes jobs; used by one thread, but for properties and `answers`. What it writes for a job depends on the job alone."""

    @property
    def strategies(self) -> Sequence[str]:
        """Names that a job may ask for."""
        ...

    @property
    def num_rows(self) -> int:
        """Sequences that are written at once."""
        ...

    @property
    def is_busy(self) -> bool:
        """True while `step` has something to do."""
        ...

    @property
    def num_waiting(self) -> int:
        """Jobs that have no row yet."""
        ...

    @property
    def is_cut_off(self) -> bool:
        """True while what it depends on elsewhere is known not to answer."""
        ...

    async def answers(self) -> bool:
        """Whether what it depends on elsewhere answers, asked now."""
        ...

    def tokenizer_of(self, strategy: str) -> PreTrainedTokenizerBase:
        """The tokenizer of the ids that a strategy writes."""
        ...

    def add(self, job: Job) -> None:
        """Take a job; it is written in the next steps."""
        ...

    def cancel(self, job: Job) -> None:
        """Forget a job and free its row; nothing more is said of it."""
        ...

    def step(self) -> list[Event]:
        """Write on, for a moment; each job's events in order."""
        ...


class EngineBackend:
    """The batched engine in this process: one decoder of `pair.batch_size` rows per strategy, made at first use.

    All decoders share the loaded models. They are stepped in turns, one round each.
    """

    def __init__(self, pair: Pair, strategies: Mapping[str, Strategy], max_length: int) -> None:
        self.pair, self.max_length = pair, max_length
        self._strategies = dict(strategies)
        self._decoders: dict[str, ContinuousDecoder] = {}
        self._jobs: dict[int, Job] = {}
        self._stops: dict[int, Stops] = {}

    @property
    def strategies(self) -> Sequence[str]:
        return list(self._strategies)

    @property
    def num_rows(self) -> int:
        return self.pair.batch_size

    @property
    def is_busy(self) -> bool:
        return any(decoder.is_busy for decoder in self._decoders.values())

    @property
    def num_waiting(self) -> int:
        return sum(len(decoder.batch.waiting) for decoder in list(self._decoders.values()))

    @property
    def is_cut_off(self) -> bool:
        return False

    async def answers(self) -> bool:
        return True

    def tokenizer_of(self, strategy: str) -> PreTrainedTokenizerBase:
        return self.pair.tokenizer_of(strategy)

    def add(self, job: Job) -> None:
        decoder, index = self._decoder(job.strategy), job.request.index
        if job.stops:
            self._stops[index] = Stops(self.tokenizer_of(job.strategy), job.stops)
        self._jobs[index] = job
        decoder.add(as_read(job.strategy, job.request))

    def cancel(self, job: Job) -> None:
        index = job.request.index
        if index in self._jobs:
            self._decoder(job.strategy).cancel(index)
            self._forget(index)

    def step(self) -> list[Event]:
        events: list[Event] = []
        for name, decoder in list(self._decoders.items()):
            if decoder.is_busy:
                events += self._round(name, decoder)
        return events

    def _round(self, name: str, decoder: ContinuousDecoder) -> list[Event]:
        events: list[Event] = []
        try:
            steps = decoder.round()
        except (
            Exception
        ):  # out of memory, say: those who wait must hear of it, and the server goes on with a new decoder
            log.exception("a round of %s failed; its requests end with an error", name)
            return self._abandon(name)
        for step in steps:
            job = self._jobs[step.request]
            events.append(WrittenToken(job, step, decoder.readings.pop((step.request, step.index), None)))
            if step.finish_reason is not None:
                decoder.costs.pop(step.request, None)
                self._forget(step.request)
        return events

    def _abandon(self, name: str) -> list[Event]:
        del self._decoders[name]
        lost = [job for job in self._jobs.values() if _decoder_name(job.strategy) == name]
        for job in lost:
            self._forget(job.request.index)
        return [Failed(job, "the engine failed while it wrote this answer; the server's log says why") for job in lost]

    def _decoder(self, strategy: str) -> ContinuousDecoder:
        name = _decoder_name(strategy)
        if name not in self._decoders:
            self._decoders[name] = self.pair.continuous(self._strategies[name], self.max_length, self._ends)
        return self._decoders[name]

    def _ends(self, index: int, token_id: int) -> bool:
        stops = self._stops.get(index)
        return stops is not None and stops.ends(index, token_id)

    def _forget(self, index: int) -> None:
        self._jobs.pop(index, None)
        self._stops.pop(index, None)


def _decoder_name(strategy: str) -> str:
    return PLAIN[0] if strategy in PLAIN else strategy
