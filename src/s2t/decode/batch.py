"""Rows in the slots of the engines that read them: admitted, run in one forward together, moved into gaps, and retired.

Row b of the SLM's engine is row b of the LLM's beside it and of the adapter's own stream, where there are any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from s2t.decode.adapter_stream import AdapterStream
from s2t.decode.reference import Reference
from s2t.model.engine import Engine
from s2t.model.loaded import Work
from s2t.records import Cost, Request

_PROMPT_TOKENS_AT_ONCE = 2**14


@dataclass(slots=True, eq=False)
class Row:
    """One sequence in its slot: either ready (the state of its next token is known), or with tokens to feed."""

    request: Request
    slot: int
    feed: list[int]
    limit: int  # of steps
    steps: int = 0
    flips: int = 0
    is_ready: bool = False
    is_finished: bool = False
    last: int = -1  # the last token of prompt and answer so far
    twin: Row | None = None  # a row that reads the same prompt in the same forward
    streams: dict[int, np.ndarray] = field(default_factory=dict)  # uniforms, made when first drawn
    held: int = 0  # tokens for which the span goes on that the row is in
    tail: str = ""  # the last characters written
    is_start: bool = True  # whether the next token begins a step of the text
    mixture: list[int] = field(default_factory=list)  # what the fed token's embedding is the mean of


@dataclass(slots=True, eq=False)
class Batch:
    """The rows that are being written, and the requests that wait for one."""

    engine: Engine
    reference: Reference | None
    stream: AdapterStream | None
    max_new_tokens: int
    ends: Callable[[int, int], bool] | None
    draws_of: Callable[[Request, int], np.ndarray]  # the uniforms of a request's stream
    waiting: deque[Request] = field(default_factory=deque)
    rows: list[Row] = field(default_factory=list)
    hidden: Tensor | None = None  # [max_rows, H], that each row's next token is predicted from
    costs: dict[int, Cost] = field(default_factory=dict)  # of finished requests

    def reserve(self, length: int) -> None:
        """Make room for rows of so many tokens, candidates behind them included."""
        for engine in (self.engine, *([self.stream.engine] if self.stream is not None else [])):
            engine.reserve(length)

    def draws(self, rows: Sequence[Row], offsets: Sequence[int], stream: int = 0) -> Tensor:
        """The uniforms of some steps, `offset` steps behind what each row has written; 0 past the last; float64 [n].

        Streams are independent of each other: what is drafted, accepted and drawn anew shares no number.
        """
        own = [self._stream(row, stream) for row in rows]
        draws = [
            drawn[row.steps + at] if row.steps + at < len(drawn) else 0.0
            for row, at, drawn in zip(rows, offsets, own, strict=True)
        ]
        return torch.tensor(draws, dtype=torch.float64, device=self.engine.device)

    def _stream(self, row: Row, stream: int) -> np.ndarray:
        if stream not in row.streams:
            row.streams[stream] = self.draws_of(row.request, stream)
        return row.streams[stream]

    def name_of(self, is_llm: bool) -> str:
        """The name of the model that a number was read from."""
        if is_llm and self.reference is not None:
            return self.reference.name
        return self.engine.loaded.name + ("" if self.engine.adapter is None else " under its adapter")

    # Rows come and go

    def admit(self) -> None:
        """Give free slots to waiting requests; their prompts run in the next forward, equal prompts once."""
        first: dict[tuple[int, ...], Row] = {}
        num_tokens = 0
        while self.waiting and len(self.rows) < self.engine.max_rows and num_tokens < _PROMPT_TOKENS_AT_ONCE:
            request = self.waiting.popleft()
            prompt = tuple(request.prompt_ids)
            limit, twin = request.max_new_tokens or self.max_new_tokens, first.get(prompt)
            row = Row(request, len(self.rows), list(prompt), limit, last=prompt[-1], twin=twin)
            if twin is None:
                first[prompt] = row
                num_tokens += len(prompt)
            self.rows.append(row)
            self.engine.reset(row.slot)
            if self.stream is not None:
                self.stream.start(row.slot, prompt)
            if self.reference is not None:
                own = request.bare_prompt_ids if self.reference.is_slm else request.llm_prompt_ids
                self.reference.start(row.slot, prompt if own is None else own)

    def retire(self) -> None:
        """Free the slots of finished rows; the last rows move into the gaps, their cells of the SLM's cache in one copy."""
        count = len(self.rows)
        finished = sorted((row for row in self.rows if row.is_finished), key=lambda row: -row.slot)
        before = {row: row.slot for row in self.rows} if finished else {}
        for row in finished:
            slm = self.engine.work[row.slot]
            if self.stream is not None:
                slm = slm + self.stream.engine.work[row.slot]
            llm = self.reference.work[row.slot] if self.reference is not None else Work()
            if self.reference is not None and self.reference.is_slm:
                slm, llm = slm + llm, Work()
            self.costs[row.request.index] = Cost(
                row.steps, slm.forwards, llm.forwards, slm.processed, llm.processed, slm.flops, llm.flops
            )
            last = self.rows.pop()
            if last is not row:
                self._move(last, row.slot)
        moved = [row for row in self.rows if before.get(row, row.slot) != row.slot]  # from past the last row left
        if moved:
            assert self.hidden is not None
            source, target = [before[row] for row in moved], [row.slot for row in moved]
            self.engine.copy(source, target)
            self.hidden[target] = self.hidden[source]
        for slot in range(len(self.rows), count):
            self.engine.reset(slot)
            if self.stream is not None:
                self.stream.engine.reset(slot)
            if self.reference is not None:
                self.reference.leave(slot)

    def _move(self, row: Row, slot: int) -> None:
        self.engine.work[slot] = self.engine.work[row.slot]
        if self.stream is not None:
            self.stream.move(row.slot, slot)
        if self.reference is not None:
            self.reference.move(row.slot, slot)
        self.rows[slot], row.slot = row, slot

    # Moving on

    def forward(self, slots: Sequence[int] = (), candidate_ids: Tensor | None = None, back: int = 0) -> Tensor:
        """One forward over what every row has to feed, and over candidates of some rows [f, K]; their states [f, K, H].

        With `back` 1 they stand in the place of the row's last token; see `Engine.step`.
        """
        fed = [row for row in self.rows if row.feed and row.twin is None]
        if not fed:
            return torch.empty(0)
        mixtures = {row.slot: row.mixture for row in fed if row.mixture}
        states, branch = self.engine.step(
            [row.slot for row in fed], [row.feed for row in fed], slots, candidate_ids, back, mixtures
        )
        if self.hidden is None:
            self.hidden = states.new_zeros(self.engine.max_rows, states.shape[-1])
        self.hidden[[row.slot for row in fed]] = states
        twins = [row for row in self.rows if row.twin is not None]
        if twins:
            source, target = zip(*((row.twin.slot, row.slot) for row in twins if row.twin is not None), strict=True)
            self.engine.copy(source, target)
            self.hidden[list(target)] = self.hidden[list(source)]
        for row in (*fed, *twins):
            row.is_ready, row.feed, row.twin, row.mixture = True, [], None, []
        return branch
