"""The llama.cpp engine: the torch engine's interface over one context of llama.cpp, so that the loop above is the same.

A state is the final hidden state with the logits behind it, [H + V] in float32, since llama.cpp gives both and keeps the output
embedding to itself. Row b is sequence b; what is read beside the rows is read in sequences behind them, which share the row's
cells, and forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from s2t.model.engine import Engine
from s2t.model.gguf.context import Context
from s2t.model.gguf.selector import GgufSelector
from s2t.model.gguf.weights import GgufModel
from s2t.model.loaded import Work

_BESIDE = 8  # sequences for what is read beside the rows
_ROWS_AT_FIRST = 4  # that there is room for at once; the cache grows as rows come


class GgufEngine(Engine):
    """B rows of a GGUF model; the LoRA of an adapter (scope `step` or `candidates`) acts on what is read beside the rows."""

    reads_inside = False

    def __init__(self, loaded: GgufModel, max_rows: int, adapter: GgufSelector | None = None) -> None:
        self.loaded, self.adapter, self.vocab_size = loaded, adapter, loaded.vocab_size
        self.scope = adapter.scope if adapter is not None else ""
        self.max_rows = max_rows
        self.lengths = [0] * max_rows
        self.work = [Work() for _ in range(max_rows)]
        self.device, self.dtype = loaded.device, torch.float32
        self.head: Any = loaded.head
        reserved = (adapter.reserved if adapter is not None else loaded.reserved).all
        self.forbidden_ids = torch.tensor([i for i in reserved if i < loaded.vocab_size]).long()
        self._branched: dict[int, int] = {}
        self._candidates: dict[int, list[int]] = {}
        self._flops = loaded.flops
        self._static = None
        self.layers = ()
        self._context: Context | None = None
        self._columns = 0

    @property
    def context(self) -> Context:
        """llama.cpp's context, made at first use."""
        if self._context is None:
            rows = min(self.max_rows, _ROWS_AT_FIRST)
            lora = self.adapter.lora if self.adapter is not None else None
            self._context = Context(self.loaded, max(256, rows * self._columns), self.max_rows + _BESIDE, lora)
        return self._context

    @property
    def cache_bytes(self) -> int:
        return self.context.cache_bytes

    @torch.inference_mode()
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], last: Sequence[int]) -> list[Tensor]:
        """As `Engine.read`: the states of the last[i] tokens that were appended last, row by row, [last[i], H + V]."""
        self._make_room(sum(map(len, tokens)))
        states = self._append(rows, tokens, last)
        return list(states.split(list(last)))

    @torch.inference_mode()
    def step(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        branch_rows: Sequence[int] = (),
        candidate_ids: Tensor | None = None,
        back: int = 0,
        mixtures: Mapping[int, Sequence[int]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Engine.step` without mixtures: the rows' tokens first, so that cells have one order, then the candidates."""
        assert not mixtures, "llama.cpp takes tokens"
        beside = _BESIDE if candidate_ids is not None else 0
        self._make_room(sum(map(len, tokens)) + beside)
        starts = {row: self.lengths[row] - back for row in branch_rows}
        if candidate_ids is not None:
            self._note_branches(branch_rows, candidate_ids.shape[1], frozenset(rows))
            self._candidates.update(zip(branch_rows, candidate_ids.tolist(), strict=True))
        states = self._append(rows, tokens, [1] * len(rows))
        if candidate_ids is None:
            return states, states[:0]
        pairs = [(row, token) for row, ids in zip(branch_rows, candidate_ids.tolist(), strict=True) for token in ids]
        return states, self._beside(pairs, starts).unflatten(0, (len(branch_rows), -1))

    def _append(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], last: Sequence[int]) -> Tensor:
        """All tokens but the last[i] of each row first, without logits; the states of those, [sum(last), H + V]."""
        silent: list[tuple[int, int, int]] = []
        read: list[tuple[int, int, int]] = []
        for row, ids, count in zip(rows, tokens, last, strict=True):
            placed = [(token, self.lengths[row] + i, row) for i, token in enumerate(ids)]
            silent += placed[: len(ids) - count]
            read += placed[len(ids) - count :]
        if silent:
            self.context.adapt(False)
            self.context.decode(*zip(*silent, strict=True))
        states = self._read(read)
        self._advance(rows, tokens)
        return states

    def _read(self, tokens: Sequence[tuple[int, int, int]], adapted: bool = False) -> Tensor:
        """States of (token, position, sequence) triples, [n, H + V]."""
        if not tokens:
            return torch.empty(0, self.head.width)
        self.context.adapt(adapted)
        return torch.from_numpy(self.context.read(*zip(*tokens, strict=True)))

    def _beside(self, pairs: Sequence[tuple[int, int]], starts: dict[int, int]) -> Tensor:
        """States of tokens read behind the first `starts` tokens of their rows, under the adapter where there is one."""
        found, first = [], self.max_rows
        for at in range(0, len(pairs), _BESIDE):
            part = pairs[at : at + _BESIDE]
            for i, (row, _) in enumerate(part):
                self.context.copy(row, first + i, starts[row])
            tokens = [(token, starts[row], first + i) for i, (row, token) in enumerate(part)]
            found.append(self._read(tokens, adapted=self.adapter is not None))
            for i in range(len(part)):
                self.context.crop(first + i, 0)
        return torch.cat(found)

    def keep_branch(self, rows: Sequence[int], index: Tensor) -> None:
        """Keep candidate index[i] of the last branch of row rows[i]; it is read once more, since branches are forgotten."""
        self.crop(rows, [self._branched[row] for row in rows])
        self.extend(rows, [[self._candidates[row][i]] for row, i in zip(rows, index.tolist(), strict=True)])

    def crop(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Forget the tokens of rows past their new lengths."""
        super().crop(rows, lengths)
        for row, length in zip(rows, lengths, strict=True):
            self.context.crop(row, length)

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Make rows `target` hold what rows `source` hold; they share its cells."""
        for old, new in zip(source, target, strict=True):
            self.context.copy(old, new, self.lengths[old])
            self.lengths[new] = self.lengths[old]

    def reserve(self, columns: int) -> None:
        """Make room for some rows of so many tokens; the cache grows when there are more."""
        self._columns = max(self._columns, columns + _BESIDE)

    def reset(self, row: int) -> None:
        super().reset(row)
        if self._context is not None:
            self._context.crop(row, 0)

    def _make_room(self, num_tokens: int) -> None:
        """Grow the cache where so many tokens more might not fit; rows that share cells count them twice."""
        needed = sum(self.lengths) + num_tokens
        if needed > self.context.num_cells:
            most = self.max_rows * self._columns + _BESIDE
            self.context.grow(
                max(needed, min(2 * needed, most)), [row for row, length in enumerate(self.lengths) if length]
            )
