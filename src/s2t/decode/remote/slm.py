"""The decoding loop of an SLM on a server: greedy and S2T-LOCAL as chunks of a completions API, many sequences at once.

A chunk brings the two criticality ids' log-probabilities at every token. At the first trigger in it the candidates are
chosen between (`choose`); if the greedy token wins, the rest of the chunk still holds, else it is dropped and the next chunk
goes on from the winner. A server with the logits processor of `s2t` finds triggers and winners itself (`plugged`), and chunks
are for what it loses. Tokens are those of `decode.loop` with the same weights.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s2t.core.onserver import Told
from s2t.core.rule import finish_reason
from s2t.core.sampling import uniforms
from s2t.decode.loop import DraftLength
from s2t.decode.remote.blocking import BlockingClient
from s2t.decode.remote.choose import CandidateScorer, Chosen
from s2t.decode.remote.client import Client
from s2t.decode.remote.plugged import Plugged
from s2t.decode.remote.selector import ServedSelector, check_strategy
from s2t.decode.remote.wire import Completion, CompletionRequest
from s2t.errors import ConfigError, RemoteError
from s2t.methods.strategies import Strategy
from s2t.model.loaded import LoadedModel, Work
from s2t.records import Candidates, Cost, Request, Step

REQUEST_COST = 16.0
"""What a request costs a server, in tokens of a full batch; from it and the rate of flips follow chunk lengths."""
_LONGEST_CHUNK = 256
_LONGEST_PLAIN = 1024  # of a chunk in which nothing fires: each is answered within the timeout, and made again alone
_ANY = (0,)  # listed where the written tokens' own log-probabilities are wanted, and no others
_MOST_LOSSES = 3  # in a row, before a sequence stays with chunks: its server seems to have no logits processor

Emit = Callable[[list[Step]], None]


@dataclass(slots=True)
class Writing:
    """One sequence as far as it is written, and what the server has read of it."""

    request: Request
    ids: list[int]  # prompt and accepted tokens
    draws: np.ndarray
    limit: int  # tokens to write
    steps: int = 0
    is_finished: bool = False
    read: int = 0  # tokens of `ids` whose keys and values the server has made, if its prefix cache never misses
    adapter_read: int = 0  # the same under the adapter (scope `stream`)
    work: Work = field(default_factory=Work)
    losses: int = 0  # replies in a row that a server's logits processor lost

    @property
    def key(self) -> str:
        return f"{self.request.index}/{self.request.key}"


class RemoteDecoder:
    """Runs requests through `greedy` or `s2t-local` on servers; the interface is that of `decode.loop.Decoder`.

    `served` is how the selector is read; None for greedy. `trace` has all K candidates of triggered steps found and scored,
    else those that could win. With `uses_plugin` the servers run the logits processor of `s2t`: without `trace`, steps then
    carry neither criticality nor candidates. Raises ConfigError for a strategy or trigger that needs more than a server gives.
    """

    def __init__(
        self,
        client: BlockingClient,
        loaded: LoadedModel,
        strategy: Strategy,
        served: ServedSelector | None,
        max_new_tokens: int = 256,
        trace: bool = False,
        ends: Callable[[int, int], bool] | None = None,
        num_rows: int = 64,
        uses_plugin: bool = False,
        max_length: int | None = None,
    ) -> None:
        check_strategy(strategy, served)
        self.client, self.loaded, self.strategy, self.served = client, loaded, strategy, served
        self.max_new_tokens, self.ends, self.num_rows, self.max_length = max_new_tokens, ends, num_rows, max_length
        self.costs: dict[int, Cost] = {}
        self.num_dropped = 0
        """Tokens that servers wrote behind a flip."""
        head = loaded.model.get_output_embeddings()
        rows = int(head.weight.shape[0])  # type: ignore[union-attr]
        self.forbidden = frozenset(loaded.reserved.all) | frozenset(range(loaded.vocab_size, rows))
        self._flops = loaded.flops
        self._plain = CompletionRequest(
            (),
            extra={
                "logit_bias": {str(i): -100.0 for i in sorted(self.forbidden) if i < rows},
                "stop_token_ids": sorted(loaded.stop_ids),
                "ignore_eos": True,  # what ends a sequence is listed above
            },
        )
        self._steps = self._flips = 0  # of all sequences: chunk lengths change no token
        self._length = DraftLength(
            0 if self._fires else min(max_new_tokens, _LONGEST_PLAIN), REQUEST_COST, _LONGEST_CHUNK
        )
        self._chooser = None
        if served is not None:
            self._chooser = CandidateScorer(served, strategy.num_candidates, self.forbidden, self._plain, trace)
        self._plugged = None
        if uses_plugin and served is not None and not trace:
            outputs = [i for i in self.forbidden if i < rows]
            self._plugged = Plugged.of(served, strategy, sorted(loaded.stop_ids), outputs, max_length)

    @property
    def _fires(self) -> bool:
        return self.strategy.trigger.name != "never"

    def run(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Yield every request's steps, interleaved, each request's in order; raises RemoteError where no server answers."""
        waiting = list(requests)
        for request in waiting:
            self._limit(request)  # refuses what cannot be asked for before anything is
        parts: Iterator[list[Step]] = self.client.stream(lambda client, emit: self._write_all(client, waiting, emit))
        for steps in parts:
            yield from steps

    async def _write_all(self, client: Client, requests: Sequence[Request], emit: Emit) -> None:
        room = asyncio.Semaphore(self.num_rows)

        async def write(request: Request) -> None:
            async with room:
                await self._write(client, request, emit)

        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(write(request))

    async def _write(self, client: Client, request: Request, emit: Emit) -> None:
        sequence = Writing(request, list(request.prompt_ids), self._draws(request), self._limit(request))
        while not sequence.is_finished:
            plugged = self._plugged if sequence.losses < _MOST_LOSSES else None
            write = self._write_ranked if plugged is not None and plugged.reading.ranks else self._write_told
            if plugged is not None and await write(client, plugged, sequence, emit):
                sequence.losses = 0
            else:
                sequence.losses += plugged is not None
                await self._write_chunk(client, sequence, emit)

    async def _write_chunk(self, client: Client, sequence: Writing, emit: Emit) -> None:
        """One chunk up to its first flip."""
        chunk = await self._chunk(client, sequence)
        for place in range(len(chunk.token_ids)):
            emit([await self._step(client, sequence, chunk, place)])
            if sequence.is_finished or sequence.ids[-1] != chunk.token_ids[place]:
                self.num_dropped += len(chunk.token_ids) - place - 1
                break

    async def _write_told(self, client: Client, plugged: Plugged, sequence: Writing, emit: Emit) -> bool:
        """What a server with the plug-in writes until it ends or restarts; False where it lost the thread."""
        num_rows = 1
        while True:
            length = len(sequence.ids)
            room = plugged.room(length, sequence.limit - sequence.steps)
            if room < 1:
                return False
            warmup, at = max(0, self.strategy.warmup_steps - sequence.steps), self._fired_at(sequence, room)
            request = plugged.request(sequence.ids, room, warmup, at, sequence.key, num_rows)
            done = await client.complete_rows(request)
            rows = [plugged.told(row, room) for row in done]
            self._count_rows(sequence, [len(row.token_ids) for row in done])
            going_on = [place for place, row in enumerate(rows) if not row.is_lost]
            is_sound = all(row.ids and self.forbidden.isdisjoint(row.ids) for row in rows)
            if len(going_on) != 1 or not is_sound:
                return False
            winner = rows[going_on[0]]
            emit(list(self._take(sequence, winner, num_rows > 1, going_on[0], rows[0].ids[0])))
            num_rows = winner.num_rows
            if sequence.is_finished or num_rows < 2:
                return True

    async def _write_ranked(self, client: Client, plugged: Plugged, sequence: Writing, emit: Emit) -> bool:
        """One chunk from a server with the plug-in, up to its first flip; False where it lost the thread. Readout `rank`."""
        length, name = len(sequence.ids), uuid.uuid4().hex
        room = plugged.room(length, self._chunk_length(sequence))
        if room < 1:
            return False
        warmup, at = max(0, self.strategy.warmup_steps - sequence.steps), self._fired_at(sequence, room)
        done = await client.complete(plugged.request(sequence.ids, room, warmup, at, sequence.key, name=name))
        told = plugged.told(done, room)
        self._count_rows(sequence, [len(done.token_ids)])
        if told.is_lost or not told.ids or not self.forbidden.isdisjoint(told.ids):
            return False
        sequence.read += len(told.ids)
        for place, greedy in enumerate(told.ids):
            token, details = greedy, {}
            if place in told.passed and plugged.reading.adapter_weight == 0:  # then the greedy token wins unasked
                details = {"fired": True, "selected_index": 0}
            elif place in told.passed:
                row = await client.complete(plugged.ranked(sequence.ids, name, place, sequence.key))
                ranked, written = plugged.told(row, 1), len(row.token_ids)
                self._count_scored(sequence, written, written)
                if ranked.is_lost or not self.forbidden.isdisjoint(ranked.ids):
                    return False
                token = ranked.ids[0] if ranked.ids else greedy
                details = {"fired": True, "selected_index": max(0, ranked.num_rows - 1)}
            emit([self._accept(sequence, token, greedy, self._drawn(sequence), details)])
            if sequence.is_finished or token != greedy:
                self.num_dropped += len(told.ids) - place - 1
                break
        return True

    def _take(self, sequence: Writing, told: Told, is_chosen: bool, selected: int, greedy: int) -> Iterator[Step]:
        """Accept a reply's text, but for the greedy token of a trigger that is still open; the first token may be a winner."""
        for place, token in enumerate(told.ids[:-1] if told.num_rows > 1 else told.ids):
            value = self._drawn(sequence)
            if is_chosen and place == 0:
                yield self._accept(sequence, token, greedy, value, {"fired": True, "selected_index": selected})
            else:
                passed = {"fired": True, "selected_index": 0} if place in told.passed else {}
                yield self._accept(sequence, token, token, value, passed)
            if sequence.is_finished:
                return

    def _drawn(self, sequence: Writing) -> float | None:
        """What the random trigger reads at the step that comes."""
        return float(sequence.draws[sequence.steps]) if len(sequence.draws) else None

    def _fired_at(self, sequence: Writing, room: int) -> list[int]:
        """Of the random trigger: which of the next steps fire."""
        start = max(sequence.steps, self.strategy.warmup_steps)
        draws = sequence.draws[start : sequence.steps + room]
        return (np.nonzero(draws < self.strategy.threshold)[0] + start - sequence.steps).tolist()

    def _count_rows(self, sequence: Writing, written: Sequence[int]) -> None:
        length, total = len(sequence.ids), sum(written)
        self._count(sequence, total, length - sequence.read + total - 1, length + total / (2 * len(written)))
        sequence.read = length

    def _draws(self, request: Request) -> np.ndarray:
        if not self.strategy.trigger.is_random:
            return np.zeros(0)
        return uniforms(self.strategy.seed, request.key or str(request.index), self._limit(request))

    def _limit(self, request: Request) -> int:
        """Tokens to write; selecting takes one more behind the last than the servers' longest sequence may have."""
        wanted = request.max_new_tokens or self.max_new_tokens
        if self.max_length is None:
            return wanted
        room = self.max_length - len(request.prompt_ids) - 1
        if room < 1:
            raise ConfigError(
                f"a prompt of {len(request.prompt_ids)} tokens leaves no room on a server that takes {self.max_length} of prompt "
                "and answer; start it with a larger --max-model-len."
            )
        return min(wanted, room)

    def _listed(self, request: Request) -> Sequence[int] | None:
        """Ids whose log-probabilities are wanted at every token."""
        if not self._fires:
            return None
        assert self.served is not None
        return self.served.yes_no or _ANY

    def _chunk_length(self, sequence: Writing) -> int:
        room = sequence.limit - sequence.steps
        return max(1, min(room, self._length.at(self._steps, self._flips)))

    async def _chunk(self, client: Client, sequence: Writing) -> Completion:
        """The next tokens of a sequence, with what the trigger reads at each."""
        request = CompletionRequest(
            sequence.ids,
            max_tokens=self._chunk_length(sequence),
            logprob_token_ids=self._listed(sequence.request),
            key=sequence.key,
            extra=self._plain.extra,
        )
        chunk = await client.complete(request)
        self._check_chunk(chunk, request)
        unread, written = len(sequence.ids) - sequence.read, len(chunk.token_ids)
        self._count(sequence, written, unread + written - 1, len(sequence.ids) + written / 2)
        sequence.read = len(sequence.ids) + written - 1
        return chunk

    def _check_chunk(self, chunk: Completion, request: CompletionRequest) -> None:
        if not chunk.token_ids or (request.logprob_token_ids and len(chunk.logprobs) != len(chunk.token_ids)):
            raise RemoteError(
                f"the server wrote {len(chunk.token_ids)} tokens and log-probabilities of {len(chunk.logprobs)}; s2t-local "
                "needs a vLLM server that returns token ids and takes logprob_token_ids."
            )
        if self.forbidden.intersection(chunk.token_ids):
            raise RemoteError(
                "the server wrote a reserved id in spite of its bias; is the folder served that --slm names?"
            )

    async def _step(self, client: Client, sequence: Writing, chunk: Completion, place: int) -> Step:
        """Accept one token: the chunk's, or at a trigger the winner."""
        greedy = chunk.token_ids[place]
        value = self._value(sequence, chunk, place)
        details = {}
        token = greedy
        if value is not None and self._is_fired(sequence, value):
            chosen = await self._choose(client, sequence, greedy, chunk.logprobs[place][greedy])
            token = chosen.ids[chosen.index]
            details = {
                "fired": True,
                "candidates": Candidates(tuple(chosen.ids), tuple(chosen.logprobs)),
                "selected_index": chosen.index,
                "scores": tuple(chosen.scores),
            }
        return self._accept(sequence, token, greedy, value, details)

    def _accept(
        self, sequence: Writing, token: int, greedy: int, value: float | None, details: Mapping[str, Any]
    ) -> Step:
        self._steps += 1
        if token != greedy:
            self._flips += 1
            sequence.read = min(sequence.read, len(sequence.ids))
        sequence.ids.append(token)
        sequence.steps += 1
        reason = self._reason(sequence, token)
        sequence.is_finished = reason is not None
        if sequence.is_finished:
            work = sequence.work
            self.costs[sequence.request.index] = Cost(
                sequence.steps, work.forwards, 0, work.processed, 0, work.flops, 0.0
            )
        return Step(
            sequence.request.index,
            sequence.steps - 1,
            token,
            greedy,
            value=value,
            finish_reason=reason,
            **details,
        )

    def _value(self, sequence: Writing, chunk: Completion, place: int) -> float | None:
        name = self.strategy.trigger.name
        if name == "criticality":
            assert self.served is not None
            return self.served.criticality(chunk.logprobs[place])
        return float(sequence.draws[sequence.steps]) if name == "random" else None

    def _is_fired(self, sequence: Writing, value: float) -> bool:
        strategy = self.strategy
        return sequence.steps >= strategy.warmup_steps and strategy.trigger.fires(value, strategy.threshold)

    def _reason(self, sequence: Writing, token: int) -> str | None:
        is_stop = token in self.loaded.stop_ids or (self.ends is not None and self.ends(sequence.request.index, token))
        return finish_reason(is_stop, sequence.steps, sequence.limit)

    async def _choose(self, client: Client, sequence: Writing, greedy: int, logprob: float) -> Chosen:
        assert self._chooser is not None and self.served is not None
        length = len(sequence.ids)
        chosen = await self._chooser.choose(client.complete, sequence.ids, greedy, logprob, sequence.key)
        self._count(sequence, chosen.num_found, chosen.num_found, length)
        self._count_scored(sequence, chosen.num_scored, chosen.num_scored)
        return chosen

    def _count_scored(self, sequence: Writing, forwards: int, processed: int) -> None:
        """Scoring; under a LoRA its first request reads what is new of the prefix (`rank`: down to the last token), too."""
        assert self.served is not None
        length = len(sequence.ids)
        if self.served.lora is not None and forwards:
            processed += length - sequence.adapter_read - self.served.ranks
            sequence.adapter_read = length
        self._count(sequence, forwards, processed, length + 1)

    def _count(self, sequence: Writing, forwards: int, processed: int, context: float) -> None:
        work = sequence.work
        work.forwards += forwards
        work.processed += processed
        work.flops += self._flops(processed, context)
