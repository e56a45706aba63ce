"""The engine: batched prefill, step, branch and crop over any Hugging Face causal LM; token ids only, never text.

Rows are slots of one preallocated cache and have lengths of their own. A forward returns the last hidden
states, which `logits` turns into a distribution and the adapter into scores; nothing is computed twice.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from s2t.model.adapter import ATTACHED, BRANCH_SCOPES, SelectorReader
from s2t.model.layout import Layout
from s2t.model.loaded import LoadedModel, Work
from s2t.model.slots import SlotCache, slot_attention
from s2t.model.static import StaticSteps

_PROMPT_TOKENS = {"cpu": 512}
"""Of one forward, by device type: larger activations lie in memory that the system clears anew each time."""


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
        self.loaded, self.adapter, self.vocab_size = loaded, adapter, loaded.vocab_size
        self.scope = scope or (adapter.scope if adapter is not None else "")
        self.model = adapter.base_model if adapter is not None else loaded.model
        self.decoder: Any = self.model.get_decoder()
        self.config = self.decoder.config.get_text_config(decoder=True)
        self.head = loaded.head
        self.max_rows = max_rows
        self.lengths = [0] * max_rows
        self.layers: tuple[int, ...] = ()  # earlier ones whose states are returned behind the last one's
        self._branched: dict[int, int] = {}  # row -> length at its last branch
        self.work = [Work() for _ in range(max_rows)]
        self.cache = SlotCache(self.config.num_hidden_layers, max_rows)
        self.device, self.dtype = self.model.device, self.model.dtype
        reserved = (adapter.reserved if adapter is not None else loaded.reserved).all
        self.forbidden_ids = torch.tensor([i for i in reserved if i < loaded.vocab_size], device=self.device).long()
        self._flops = loaded.flops
        how = execution or loaded.execution
        self._static = None
        if how in ("static", "compile") or (how == "auto" and self.device.type == "cuda"):
            self._static = StaticSteps(self.decoder, self.config, self.cache, max_rows, self.device, how == "compile")

    @property
    def cache_bytes(self) -> int:
        """Memory the keys and values of all rows take."""
        return self.cache.num_bytes

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits with reserved ids and padding rows masked; [..., H] -> [..., vocab_size], float32."""
        return self.own_logits(hidden).float()

    @torch.inference_mode()
    def own_logits(self, hidden: Tensor) -> Tensor:
        """The same in the model's own dtype, for what compares them, or casts a few rows at a time."""
        own = hidden if not self.layers else hidden[..., : hidden.shape[-1] // (1 + len(self.layers))]
        return self.mask(self.head.own(own))  # fresh: masked in place

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
        parts = self._parts(tokens)
        if len(parts) > 1:
            found: dict[int, Tensor] = {}
            for part in parts:
                own = self.read([rows[i] for i in part], [tokens[i] for i in part], [last[i] for i in part])
                found |= dict(zip(part, own, strict=True))
            return [found[i] for i in range(len(rows))]
        layout = Layout(self.device)
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
        *before, last_part = self._parts(tokens)
        if before:
            states = [self.step([rows[i] for i in part], [tokens[i] for i in part])[0] for part in before]
            own_rows, own_tokens = [rows[i] for i in last_part], [tokens[i] for i in last_part]
            own, branch = self.step(own_rows, own_tokens, branch_rows, candidate_ids, back, mixtures)
            order = torch.tensor([i for part in (*before, last_part) for i in part], device=self.device)
            return torch.cat([*states, own])[order.argsort()], branch
        layout = Layout(self.device)
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
        not change: follow with `keep_branch` to keep one candidate, or with `extend` to go on from the prefix.
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
        self, layout: Layout, branches_from: int | None = None, mixed: Mapping[int, Sequence[int]] | None = None
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
            if (attached := self.model.__dict__.get(ATTACHED)) is not None:
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

    def _parts(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Places of `tokens` that had better run in a forward each: whole prompts, and last those of single tokens."""
        limit = _PROMPT_TOKENS.get(self.device.type, sys.maxsize)
        if sum(map(len, tokens)) <= limit:
            return [list(range(len(tokens)))]
        parts: list[list[int]] = []
        held = limit
        for i, ids in enumerate(tokens):
            if len(ids) == 1:
                continue
            if not parts or held + len(ids) > limit:
                parts.append([])
                held = 0
            parts[-1].append(i)
            held += len(ids)
        single = [i for i, ids in enumerate(tokens) if len(ids) == 1]
        return [*parts, single] if single else parts

    def _advance(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """Note tokens that were appended, and what they cost."""
        for row, ids in zip(rows, tokens, strict=True):
            work, width = self.work[row], len(ids)
            work.forwards += 1
            work.processed += width
            work.flops += self._flops(width, self.lengths[row] + width / 2)
            self.lengths[row] += width

    def _note_branches(self, rows: Sequence[int], width: int, stepping: frozenset[int]) -> None:
        for row in rows:
            self._branched[row] = self.lengths[row]
            work = self.work[row]
            work.forwards += row not in stepping  # else the same forward
            work.processed += width
            work.flops += self._flops(width, self.lengths[row] + 1)


def mixed_embeddings(model: Any, ids: Tensor, mixed: Mapping[int, Sequence[int]]) -> Tensor:
    """Embeddings of a flat line of tokens [1, N], at some places the mean over several ids; [1, N, H]."""
    table = model.get_input_embeddings()
    embeddings = table(ids).clone()
    for place, several in mixed.items():
        embeddings[0, place] = table(torch.tensor(list(several), device=ids.device)).mean(0)
    return embeddings
