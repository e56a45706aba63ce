"""The engine: batched prefill, step, branch, accept and crop over any Hugging Face causal LM; token ids only, never text.

Rows are slots of one preallocated cache and have lengths of their own. A forward returns the last hidden
states, which `logits` turns into a distribution and the adapter into scores; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from s2t.model.adapter import BRANCH_SCOPES, SelectorReader, attached_adapter
from s2t.model.attention import Segment, slot_attention
from s2t.model.cache import SlotCache
from s2t.model.flops import FlopCount, Work
from s2t.model.head import Head
from s2t.model.load import LoadedModel
from s2t.model.mixtures import mixed_embeddings
from s2t.model.static import StaticSteps
from s2t.model.tree import causal_mask, tree_mask

_FILLED_GAP = 4  # rows


class Engine:
    """B rows of one model, each with its own tokens; see the module docstring for the contract.

    `adapter` adds the selector: under scope `always` it acts on every token, under `step` and `candidates` on the
    tokens of `branch` alone, under `stream` on none (an engine of scope `always` beside this one reads for the selector);
    `scope` is the adapter's unless given. `forbidden_ids` (the tokenizer's reserved ids) are never proposed. `execution` says
    how steps run: eager, static (fixed shapes, CUDA graphs on a GPU), compile (torch.compile as well), or auto (static on a
    GPU).
    """

    reads_inside: ClassVar[bool] = True
    """Whether earlier layers and input embeddings can be reached."""

    def __init__(
        self,
        loaded: LoadedModel,
        max_rows: int,
        adapter: SelectorReader | None = None,
        execution: str | None = None,
        scope: str | None = None,
    ) -> None:
        self.loaded = loaded
        self.adapter = adapter
        self.scope = scope or (adapter.scope if adapter is not None else "")
        self.model = adapter.base_model if adapter is not None else loaded.model
        self.decoder: Any = self.model.get_decoder()
        self.config = self.decoder.config.get_text_config(decoder=True)
        self.head = Head(self.model)
        self.max_rows = max_rows
        self.lengths = [0] * max_rows
        self.layers: tuple[int, ...] = ()  # earlier ones whose states are returned behind the last one's
        self._branched: dict[int, int] = {}  # row -> length at its last branch
        self.work = [Work() for _ in range(max_rows)]
        self.cache = SlotCache(self.config.num_hidden_layers, max_rows)
        self.device, self.dtype = loaded.device, loaded.model.dtype
        reserved = (adapter.reserved if adapter is not None else loaded.reserved).all
        self.forbidden_ids = torch.tensor([i for i in reserved if i < loaded.vocab_size], device=self.device).long()
        self._flops = FlopCount(self.model, self.config)
        self._static = self._static_steps(execution or loaded.execution)

    def _static_steps(self, execution: str) -> StaticSteps | None:
        if execution == "eager" or (execution == "auto" and self.device.type != "cuda"):
            return None
        return StaticSteps(self.decoder, self.config, self.cache, self.max_rows, self.device, execution == "compile")

    @property
    def vocab_size(self) -> int:
        return self.loaded.vocab_size

    @property
    def cache_bytes(self) -> int:
        """Memory the keys and values of all rows take."""
        return self.cache.num_bytes

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits with reserved ids and padding rows masked; [..., H] -> [..., vocab_size], float32."""
        own = hidden if not self.layers else hidden[..., : hidden.shape[-1] // (1 + len(self.layers))]
        return self.mask(self.head(own))  # fresh: masked in place

    def mask(self, logits: Tensor) -> Tensor:
        """Mask reserved ids in place and leave padding rows out; [..., V] -> [..., vocab_size]."""
        return logits[..., : self.vocab_size].index_fill_(-1, self.forbidden_ids, float("-inf"))

    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens[i] (at least one) to row rows[i]; returns the last token's hidden state, [n, H].

        Prefill is `extend` of an empty row, a step is `extend` by one token; rows may mix both in one forward.
        """
        return self.step(rows, tokens)[0]

    @torch.inference_mode()
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], last: Sequence[int]) -> list[Tensor]:
        """As `extend`, but returns the hidden states of the last[i] tokens that were appended last, row by row, [last[i], H]."""
        layout = _Layout(self.device)
        starts = layout.add_tokens(rows, tokens, self.lengths)
        hidden = self._run(layout)
        self._advance(rows, tokens)
        ends = [at + len(ids) for at, ids in zip(starts, tokens, strict=True)]
        return [hidden[end - count : end] for end, count in zip(ends, last, strict=True)]

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
        """`extend` and `branch` in one forward: a row's K candidates stand where its new token (if any) stands.

        Returns the last hidden states of `rows`, [n, H], and those of the candidates, [f, K, H]. Under the scopes
        `step` and `candidates` the adapter acts on the candidates alone. With `back` 1 they stand one position earlier, in
        the place of the row's last token, which they do not see: so a row's last token is read once more, as K = 1 candidate.
        A row of `mixtures` takes the mean embedding of those ids in the place of its last token's.
        """
        if (
            self._static is not None
            and not (mixtures or self.layers)
            and rows
            and self.cache.is_initialized
            and all(len(ids) == 1 for ids in tokens)
        ):
            return self._static_step(self._static, rows, [ids[0] for ids in tokens], branch_rows, candidate_ids, back)
        layout = _Layout(self.device)
        starts = layout.add_tokens(rows, tokens, self.lengths)
        count = layout.num_tokens
        if candidate_ids is not None:
            layout.add_branches(branch_rows, candidate_ids, self.lengths, back)
            self._note_branches(branch_rows, candidate_ids.shape[1], frozenset(rows))
        last = [at + len(ids) - 1 for at, ids in zip(starts, tokens, strict=True)]
        mixed = {at: (mixtures or {})[row] for at, row in zip(last, rows, strict=True) if row in (mixtures or {})}
        hidden = self._run(layout, branches_from=count, mixed=mixed)
        self._advance(rows, tokens)
        wanted = hidden[:count]
        if last != list(range(count)):
            wanted = hidden[torch.tensor(last, device=self.device).long()]
        return wanted, hidden[count:].unflatten(0, (len(branch_rows), -1)) if branch_rows else hidden[count:]

    def _static_step(
        self,
        static: StaticSteps,
        rows: Sequence[int],
        tokens: Sequence[int],
        branch_rows: Sequence[int],
        candidate_ids: Tensor | None,
        back: int,
    ) -> tuple[Tensor, Tensor]:
        """A step of one token a row, as `step`; rows in between that add none run a token that is written again later."""
        ids = [0] * (max(rows) + 1)
        for row, token in zip(rows, tokens, strict=True):
            ids[row] = token
        hidden, branch = static.run(self.lengths, ids, branch_rows, candidate_ids, self._adapted, back)
        if candidate_ids is not None:
            self._note_branches(branch_rows, candidate_ids.shape[1], frozenset(rows))
        self._advance(rows, [[token] for token in tokens])
        is_whole = list(rows) == list(range(len(ids)))
        return hidden if is_whole else hidden[torch.tensor(list(rows), device=self.device)], branch

    def branch(self, rows: Sequence[int], candidate_ids: Tensor) -> Tensor:
        """One forward over K candidates per row, all at the next position, each seeing the prefix and itself.

        candidate_ids [n, K] -> hidden states [n, K, H] (under the adapter, if there is one). Row lengths do
        not change: follow with `accept` to keep one candidate, or with `extend` to go on from the prefix.
        """
        return self.step((), (), rows, candidate_ids)[1]

    @torch.inference_mode()
    def keep_branch(self, rows: Sequence[int], index: Tensor) -> None:
        """Keep candidate index[i] of the last branch of row rows[i] in its cache, in place of whatever stands there; [n]."""
        starts = torch.tensor([self._branched[row] for row in rows], device=self.device)
        slots = torch.tensor(list(rows), device=self.device)
        self.cache.copy_columns(slots, starts + 1 + index.to(self.device), starts)
        for row in rows:
            self.lengths[row] = self._branched[row] + 1

    def crop(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Forget the tokens of rows past their new lengths."""
        for row, length in zip(rows, lengths, strict=True):
            assert 0 <= length <= self.lengths[row]
            self.lengths[row] = length

    @torch.inference_mode()
    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Make rows `target` hold what rows `source` hold (a shared prompt, or a slot that moves)."""
        if not source:
            return
        self.cache.copy_rows(list(source), list(target), max(self.lengths[row] for row in source))
        for old, new in zip(source, target, strict=True):
            self.lengths[new] = self.lengths[old]

    def reserve(self, columns: int) -> None:
        """Make room for rows of so many tokens, where steps have fixed shapes; else the cache grows as rows do."""
        if self._static is not None:
            self.cache.reserve(columns)

    def reset(self, row: int) -> None:
        """Empty a slot for the next sequence."""
        self.lengths[row] = 0
        self.work[row] = Work()

    def _run(
        self, layout: _Layout, branches_from: int | None = None, mixed: Mapping[int, Sequence[int]] | None = None
    ) -> Tensor:
        """One forward over all segments; hidden states [N, H] in the layout's order, earlier layers' behind the last one's."""
        ids, positions = layout.tensors()  # [1, N] each
        inputs: dict[str, Tensor] = (
            {"inputs_embeds": mixed_embeddings(self.model, ids, mixed)} if mixed else {"input_ids": ids}
        )
        self.cache.segments[:] = layout.segments
        with slot_attention(self.config), self._adapted(branches_from, layout.num_tokens):
            output = self.decoder(
                **inputs,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                segments=layout.segments,
                **({"output_hidden_states": True} if self.layers else {}),
            )
        if not self.layers:
            return output.last_hidden_state[0]
        return torch.cat([output.last_hidden_state, *(output.hidden_states[layer] for layer in self.layers)], dim=-1)[0]

    def layer_logits(self, hidden: Tensor) -> Tensor:
        """Masked logits read from the earlier layers of `layers`, behind the last one's in each state; [n, H'] -> [L, n, V]."""
        parts = hidden.unflatten(-1, (1 + len(self.layers), -1))[:, 1:].transpose(0, 1)  # [L, n, H]
        return self.mask(self.head(parts))

    def _adapted(self, branches_from: int | None, num_tokens: int) -> AbstractContextManager[None]:
        """The adapter on every token, on none, or (scopes `step`, `candidates`) on the tokens from `branches_from` on."""
        if self.adapter is None:
            if (attached := attached_adapter(self.model)) is not None:
                attached.act(False)
            return nullcontext()
        first = num_tokens if branches_from is None else branches_from
        if self.scope == "always" or (self.scope in BRANCH_SCOPES and first == 0):
            self.adapter.act(True)
            return nullcontext()
        self.adapter.act(False)
        if self.scope == "stream":
            return nullcontext()
        return self.adapter.acting_from(first, num_tokens) if first < num_tokens else nullcontext()

    def _advance(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        widths = [len(ids) for ids in tokens]
        self._count(rows, widths, [self.lengths[row] + n / 2 for row, n in zip(rows, widths, strict=True)])
        for row, n in zip(rows, widths, strict=True):
            self.lengths[row] += n

    def _note_branches(self, rows: Sequence[int], width: int, stepping: frozenset[int]) -> None:
        for row in rows:
            self._branched[row] = self.lengths[row]
            work = self.work[row]
            work.forwards += row not in stepping  # else the same forward
            work.processed += width
            work.flops += self._flops(width, self.lengths[row] + 1)

    def _count(self, rows: Sequence[int], widths: Sequence[int], contexts: Sequence[float]) -> None:
        for row, width, context in zip(rows, widths, contexts, strict=True):
            work = self.work[row]
            work.forwards += 1
            work.processed += width
            work.flops += self._flops(width, context)


class _Layout:
    """The tokens of one forward in one flat line, and the segments that say where in the cache they belong."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.segments: list[Segment] = []
        self.num_tokens = 0
        self._ids: list[Tensor] = []

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
