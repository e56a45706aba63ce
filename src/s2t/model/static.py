"""Steps of fixed shapes: recorded once as a CUDA graph and replayed, compiled by torch.compile if wanted.

A step of B neighbouring rows with a token each, and of F x K candidates beside them, runs on tensors that stay where
they are, so a GPU need not wait for Python to launch a thousand kernels. B, F and the columns read are rounded up to a
few sizes; what the extra places write is never seen and written again later. Without a GPU the same code runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2t.model.slots import Segment, SlotCache, causal_mask, slot_attention, tree_mask

_MIN_COLUMNS = 256
_MAX_COMPILED = 256  # shapes; torch.compile gives up after 8 unless told otherwise
_WARMUP_RUNS = 2

Adapted = Callable[[int | None, int], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class _Shape:
    rows: int
    branches: int
    width: int  # K
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.rows + self.branches * self.width


@dataclass(slots=True)
class _Recording:
    """The inputs of one shape, which stay in place, and on a GPU the graph that turns them into the output."""

    ids: Tensor  # [N]
    places: Tensor  # [3N + F]: ids, positions and columns of all tokens, rows of the branches; ids may be filled apart
    graph: Any = None
    output: Tensor | None = None  # [N, H]


class StaticSteps:
    """Runs the steps of one engine by shape; `adapted(first, N)` is the adapter acting on tokens from `first` on."""

    def __init__(
        self, decoder: Any, config: Any, cache: SlotCache, max_rows: int, device: torch.device, compiles: bool
    ) -> None:
        self.decoder, self.config, self.cache, self.max_rows, self.device = decoder, config, cache, max_rows, device
        self.compiles = compiles
        self._forward: Callable[..., Tensor] = torch.compile(self._plain, dynamic=False) if compiles else self._plain
        self._recordings: dict[_Shape, _Recording] = {}
        self._pool: Any = None
        self._capacity = 0

    def run(
        self,
        held: Sequence[int],
        tokens: Sequence[int],
        branch_rows: Sequence[int],
        candidate_ids: Tensor | None,
        adapted: Adapted,
        back: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """One token for each of the first len(tokens) rows, and K candidates [f, K] of some rows; held: lengths of all rows.

        Candidates stand at the row's next position, or `back` before it, without seeing what stands there.
        Returns hidden states [len(tokens), H] and [f, K, H].
        """
        num_rows, num_branches = len(tokens), len(branch_rows)
        width = candidate_ids.shape[1] if candidate_ids is not None and num_branches else 0
        shape = self._shape(held, num_rows, branch_rows, width)
        if self._capacity != self.cache.capacity:  # what was recorded reads stores that are gone
            self._recordings.clear()
            self._pool = None  # CUDA takes a pool back with the last graph that is in it
            self._capacity = self.cache.capacity
        recording = self._recordings.get(shape) or self._new(shape)
        self._fill(recording, shape, held, tokens, branch_rows, candidate_ids, back)
        output = self._replay(recording, shape, adapted)
        branch = output[shape.rows :].unflatten(0, (shape.branches, width))[:num_branches] if width else output[:0]
        return output[:num_rows], branch

    def _shape(self, held: Sequence[int], num_rows: int, branch_rows: Sequence[int], width: int) -> _Shape:
        step = 4 if self.compiles else 2  # fewer shapes where each one is compiled
        rows = self.max_rows if self.compiles else min(_power(num_rows, step), self.max_rows)
        branches = min(_power(len(branch_rows), step), self.max_rows) if branch_rows else 0
        needed = max(max(held[:rows]) + 1, max((held[row] + 1 + width for row in branch_rows), default=0))
        if needed > self.cache.capacity:
            self.cache.reserve(_columns(needed))
        columns = self.cache.capacity if self.compiles else min(_columns(needed), self.cache.capacity)
        return _Shape(rows, branches, width, columns)

    def _new(self, shape: _Shape) -> _Recording:
        places = torch.zeros(3 * shape.num_tokens + shape.branches, dtype=torch.long, device=self.device)
        recording = self._recordings[shape] = _Recording(places[: shape.num_tokens], places)
        return recording

    def _fill(
        self,
        recording: _Recording,
        shape: _Shape,
        held: Sequence[int],
        tokens: Sequence[int],
        branch_rows: Sequence[int],
        candidate_ids: Tensor | None,
        back: int,
    ) -> None:
        """Write a step's inputs in one copy; the candidates, which are on the device already, in another."""
        rows = list(held[: shape.rows])
        branches = [*branch_rows, *([branch_rows[0]] * (shape.branches - len(branch_rows)))] if branch_rows else []
        positions = [held[row] - back for row in branches for _ in range(shape.width)]
        columns = [held[row] + 1 + i for row in branches for i in range(shape.width)]
        ids = [*tokens, *([0] * (shape.num_tokens - len(tokens)))]
        recording.places.copy_(torch.tensor([*ids, *rows, *positions, *rows, *columns, *branches]))
        if branches:
            assert candidate_ids is not None
            filled = recording.ids[shape.rows :].view(shape.branches, shape.width)
            filled[: len(branch_rows)] = candidate_ids
            filled[len(branch_rows) :] = candidate_ids[0]

    def _replay(self, recording: _Recording, shape: _Shape, adapted: Adapted) -> Tensor:
        """The hidden states of all places, [N, H], which later steps do not touch."""
        if self.device.type != "cuda":
            return self._step(recording, shape, adapted)
        graph = recording.graph or self._record(recording, shape, adapted)
        graph.replay()
        assert recording.output is not None
        return recording.output.clone()

    def _record(self, recording: _Recording, shape: _Shape, adapted: Adapted) -> Any:
        """Capture one step as a CUDA graph, after running it a few times beside the main stream, as CUDA asks."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_RUNS):
                self._step(recording, shape, adapted)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        recording.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recording.graph, pool=self._pool):
            recording.output = self._step(recording, shape, adapted)
        return recording.graph

    def _step(self, recording: _Recording, shape: _Shape, adapted: Adapted) -> Tensor:
        segments, positions = self._segments(recording, shape)
        self.cache.segments[:] = segments
        first = shape.rows if shape.branches else None
        with slot_attention(self.config), adapted(first, shape.num_tokens):
            if not self.compiles:
                return self._forward(recording.ids[None], positions[None], segments)
            with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED):  # type: ignore[attr-defined]
                return self._forward(recording.ids[None], positions[None], segments)

    def _segments(self, recording: _Recording, shape: _Shape) -> tuple[list[Segment], Tensor]:
        n, rows = shape.num_tokens, shape.rows
        positions, columns = recording.places[n : 2 * n], recording.places[2 * n : 3 * n]
        single = positions[:rows, None]
        segments = [Segment(0, single, single, None, shape.columns, causal_mask(single, shape.columns))]
        if shape.branches:
            branches = recording.places[3 * n :]
            tree = columns[rows:].view(shape.branches, shape.width)
            own = positions[rows:].view(shape.branches, shape.width)
            prefix = own[:, 0]
            visible = tree_mask(prefix, tree, shape.columns)
            segments.append(Segment(0, own, tree, None, shape.columns, visible, prefix_lengths=prefix, rows=branches))
        for segment in segments:
            segment.mask(getattr(self.config, "sliding_window", None))  # once, outside of what is compiled
        return segments, positions

    def _plain(self, ids: Tensor, positions: Tensor, segments: list[Segment]) -> Tensor:
        output = self.decoder(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, segments=segments
        )
        return output.last_hidden_state[0]


def _power(count: int, step: int) -> int:
    """The smallest power of `step` that is at least `count`."""
    size = 1
    while size < count:
        size *= step
    return size


def _columns(needed: int) -> int:
    """256, 384, 512, 768, 1024, ...: at most half as much again as is needed."""
    size = _MIN_COLUMNS
    while size < needed:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
