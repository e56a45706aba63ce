"""How the tokens of one forward lie: in one flat line, with segments that say where in the cache they belong.

Neighbouring rows share a segment, which reads its rows of the cache in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2t.model.slots import Segment, causal_mask, tree_mask

_FILLED_GAP = 4  # rows


@dataclass(slots=True)
class Layout:
    """The tokens of one forward in one flat line, and the segments that say where in the cache they belong."""

    device: torch.device
    segments: list[Segment] = field(default_factory=list)
    num_tokens: int = 0
    _ids: list[Tensor] = field(default_factory=list)

    def add_tokens(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
        """Lay out tokens[i] behind row rows[i]; returns the flat place of each row's first token.

        Rows that add one token come first, then prompts and drafts, all as runs of neighbouring rows, so that the cache
        is read in place.
        """
        starts = [0] * len(rows)
        for run in _runs([(i, rows[i]) for i, ids in enumerate(tokens) if len(ids) == 1], max_gap=_FILLED_GAP):
            self._add_single(run, rows, tokens, lengths, starts)
        wide = [(i, rows[i]) for i, ids in enumerate(tokens) if len(ids) > 1]
        for run in _runs(wide, max_gap=0):
            for group in _similar(run, [len(ids) for ids in tokens], [lengths[row] for row in rows]):
                self._add_group(group, rows, tokens, lengths, starts)
        return starts

    def _add_single(
        self,
        run: Sequence[int],
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        starts: list[int],
    ) -> None:
        """One token per row; a row in between that adds none runs a token whose place is written again later."""
        first, last = rows[run[0]], rows[run[-1]]
        ids = [0] * (last + 1 - first)
        for i in run:
            ids[rows[i] - first] = tokens[i][0]
            starts[i] = self.num_tokens + rows[i] - first
        held = lengths[first : last + 1]
        positions = torch.tensor(held, device=self.device)[:, None]  # [n, 1]
        extent = max(held) + 1
        is_even = min(held) + 1 == extent
        visible = None if is_even else causal_mask(positions, extent)
        self._add(
            torch.tensor(ids, device=self.device),
            Segment(first, positions, positions, held[0] if is_even else None, extent, visible),
        )

    def _add_group(
        self,
        group: Sequence[int],
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        starts: list[int],
    ) -> None:
        """Several tokens per row, right-padded to one width; what padding writes is never seen and written again later."""
        width = max(len(tokens[i]) for i in group)
        held = [lengths[rows[i]] for i in group]
        for place, i in enumerate(group):
            starts[i] = self.num_tokens + place * width
        ids = torch.tensor(
            [[*tokens[i], *([tokens[i][-1]] * (width - len(tokens[i])))] for i in group], device=self.device
        )
        positions = torch.tensor(held, device=self.device)[:, None] + torch.arange(width, device=self.device)  # [n, T]
        extent = max(held) + width
        is_new = extent == width
        visible = None if is_new else causal_mask(positions, extent)
        start = held[0] if min(held) == max(held) else None
        self._add(ids.flatten(), Segment(rows[group[0]], positions, positions, start, extent, visible, is_new))

    def add_branches(self, rows: Sequence[int], candidate_ids: Tensor, lengths: Sequence[int], back: int) -> None:
        """Candidates [n, K] of rows: `back` before the next position, in the columns behind the one an ordinary token takes."""
        width = candidate_ids.shape[1]
        held = [lengths[row] for row in rows]
        end = torch.tensor(held, device=self.device)
        prefix = end - back
        columns = end[:, None] + 1 + torch.arange(width, device=self.device)  # [n, K]
        extent = max(held) + 1 + width
        positions = prefix[:, None].expand(-1, width)
        visible = tree_mask(prefix, columns, extent)
        segment = Segment(rows[0], positions, columns, None, extent, visible, prefix_lengths=prefix)
        if list(rows) != list(range(rows[0], rows[0] + len(rows))):
            segment.rows = torch.tensor(list(rows), device=self.device)
        elif min(held) == max(held):
            segment.start = held[0] + 1
        self._add(candidate_ids.flatten(), segment)

    def _add(self, ids: Tensor, segment: Segment) -> None:
        self.segments.append(segment)
        self._ids.append(ids)
        self.num_tokens += ids.numel()

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Token ids and positions, [1, N] each."""
        positions = [segment.positions.flatten() for segment in self.segments]
        if len(positions) == 1:
            return self._ids[0][None], positions[0][None]
        return torch.cat(self._ids)[None], torch.cat(positions)[None]


def _runs(items: Sequence[tuple[int, int]], max_gap: int) -> list[list[int]]:
    """Cut (index, row) pairs where the rows are no neighbours; up to `max_gap` rows may be left out in between."""
    runs: list[list[int]] = []
    previous = None
    for index, row in items:
        if previous is None or not previous < row <= previous + 1 + max_gap:
            runs.append([])
        runs[-1].append(index)
        previous = row
    return runs


def _similar(run: Sequence[int], widths: Sequence[int], held: Sequence[int]) -> list[list[int]]:
    """Cut a run of rows where padding to one width would cost more than a quarter, or an empty row meets a filled one."""
    groups: list[list[int]] = []
    for i in run:
        if groups:
            group = [*groups[-1], i]
            padded = max(widths[k] for k in group) * len(group)
            if 4 * padded <= 5 * sum(widths[k] for k in group) and (held[i] == 0) == (held[group[0]] == 0):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups
