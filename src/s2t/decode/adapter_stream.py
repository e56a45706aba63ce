"""Scope `stream`: the adapter's own reading of every row, beside the base model's, for the candidates alone.

A row's tokens wait in a list until the row triggers for the first time; then, and at later triggers, what is new is read
in one forward, whose last state ranks the candidates (readout `rank`), or behind which another reads them (`bins`). A row
that never triggers costs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from s2t.model.engine import Engine
from s2t.model.loaded import Work

_TOKENS_AT_ONCE = 2**14  # of all rows that catch up in one forward


class AdapterStream:
    """Row b of its engine follows row b of the loop's, under the adapter from the first prompt token on."""

    def __init__(self, base: Engine) -> None:
        assert base.adapter is not None
        self.engine = Engine(base.loaded, base.max_rows, base.adapter, scope="always")
        self.pending: list[list[int]] = [[] for _ in range(base.max_rows)]

    def start(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Begin a sequence in a slot; nothing is computed yet."""
        self.engine.reset(row)
        self.pending[row] = list(prompt_ids)

    def push(self, row: int, token: int) -> None:
        """The row has accepted a token; it is read when the row triggers next."""
        self.pending[row].append(token)

    def read(self, rows: Sequence[int], candidate_ids: Tensor) -> Tensor:
        """States of candidates behind all tokens of their rows, under the adapter; [f, K] -> [f, K, H]."""
        for part in self._parts([row for row in rows if self.pending[row]]):
            self._catch_up(part)
        return self.engine.branch(rows, candidate_ids)

    def read_last(self, rows: Sequence[int]) -> Tensor:
        """State of the last token of rows that have accepted one since they were read, under the adapter; [f, 1, H]."""
        return torch.cat([self._catch_up(part) for part in self._parts(rows)])[:, None]

    def _parts(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Rows cut, in order, where their tokens would be too many for one forward."""
        part: list[int] = []
        for row in rows:
            if part and sum(len(self.pending[i]) for i in (*part, row)) > _TOKENS_AT_ONCE:
                yield part
                part = []
            part.append(row)
        if part:
            yield part

    def _catch_up(self, rows: Sequence[int]) -> Tensor:
        states = self.engine.extend(rows, [self.pending[row] for row in rows])
        for row in rows:
            self.pending[row] = []
        return states

    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` live in slot `target`."""
        if self.engine.cache.is_initialized:
            self.engine.copy([source], [target])
        else:
            self.engine.lengths[target] = self.engine.lengths[source]
        self.engine.work[target], self.engine.work[source] = self.engine.work[source], Work()
        self.pending[target], self.pending[source] = self.pending[source], []
