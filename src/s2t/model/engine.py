"""The engine: batched prefill, step, branch, accept and crop over any Hugging Face causal LM; token ids only, never text.

Rows are slots of one preallocated cache and have lengths of their own. A forward returns the last hidden
states, which `logits` turns into a distribution and the adapter into scores; nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2t.core.candidates import mask_forbidden
from s2t.errors import ModelError
from s2t.model.adapter import SelectorAdapter, attached_adapter
from s2t.model.cache import SlotCache
from s2t.model.load import LoadedModel
from s2t.model.tree import causal_mask, key_positions, layer_masks, tree_mask


@dataclass(slots=True)
class Work:
    """What one row cost so far on one model; forwards count once per row and call."""

    forwards: int = 0
    processed: int = 0
    flops: float = 0.0


class Head:
    """Last hidden states to logits exactly as the model's own forward does, for chosen positions only."""

    def __init__(self, model: nn.Module) -> None:
        config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr]
        self.linear = model.get_output_embeddings()  # type: ignore[operator]
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.divisor = float(getattr(config, "logits_scaling", None) or 1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], float32."""
        logits = self.linear(hidden).float() * self.scale / self.divisor
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


class Engine:
    """B rows of one model, each with its own tokens; see the module docstring for the contract.

    `adapter` adds the selector: under scope `always` it acts on every token, under `candidates` on the
    tokens of `branch` alone. `forbidden_ids` (the tokenizer's reserved ids) are never proposed.
    """

    def __init__(self, loaded: LoadedModel, max_rows: int, adapter: SelectorAdapter | None = None) -> None:
        self.loaded = loaded
        self.adapter = adapter
        self.model = adapter.base_model if adapter is not None else loaded.model
        self.decoder: Any = self.model.get_decoder()
        self.config = self.model.config.get_text_config(decoder=True)
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ModelError(
                f"attention {self.config._attn_implementation!r} takes no tree mask; load the model with sdpa or eager."
            )
        self.head = Head(self.model)
        self.max_rows = max_rows
        self.lengths = [0] * max_rows
        self.work = [Work() for _ in range(max_rows)]
        self.cache = SlotCache(self.config.num_hidden_layers, max_rows)
        self.device, self.dtype = loaded.device, loaded.model.dtype
        reserved = (adapter.reserved if adapter is not None else loaded.reserved).all
        self.forbidden_ids = torch.tensor([i for i in reserved if i < loaded.vocab_size], device=self.device).long()
        self._flops = _FlopCount(self.model, self.config)

    @property
    def vocab_size(self) -> int:
        return self.loaded.vocab_size

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits with reserved ids and padding rows masked; [..., H] -> [..., vocab_size], float32."""
        return mask_forbidden(self.head(hidden), self.forbidden_ids, self.vocab_size)

    @torch.inference_mode()
    def extend(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens[i] (at least one) to row rows[i]; returns the last token's hidden state, [n, H].

        Prefill is `extend` of an empty row, a step is `extend` by one token each, in one forward either way.
        """
        hidden = self._forward_tokens(rows, tokens)
        last = torch.tensor([len(ids) - 1 for ids in tokens], device=self.device)
        return hidden[torch.arange(len(rows), device=self.device), last]

    @torch.inference_mode()
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """As `extend`, but returns the hidden state of every appended token, [n, T, H] (right-padded)."""
        return self._forward_tokens(rows, tokens)

    @torch.inference_mode()
    def branch(self, rows: Sequence[int], candidate_ids: Tensor) -> Tensor:
        """One forward over K candidates per row, all at the next position, each seeing the prefix and itself.

        candidate_ids [n, K] -> hidden states [n, K, H] (under the adapter, if there is one). Row lengths do
        not change: follow with `accept` to keep one candidate, or with `extend` to go on from the prefix.
        """
        count, width = candidate_ids.shape
        lengths = torch.tensor([self.lengths[row] for row in rows], device=self.device)
        columns = lengths[:, None] + torch.arange(width, device=self.device)  # [n, K]
        extent = max(self.lengths[row] for row in rows) + width
        positions = lengths[:, None].expand(count, width)
        mask = tree_mask(lengths, width, extent)
        keys = key_positions(extent, lengths, positions)
        self._count(rows, [width] * count, [self.lengths[row] + 1 for row in rows])
        self._set_adapter(is_branch=True)
        return self._run(rows, candidate_ids, positions, columns, mask, keys, extent)

    @torch.inference_mode()
    def accept(self, rows: Sequence[int], index: Tensor) -> None:
        """Keep candidate index[i] of the last `branch` of row rows[i] in its cache and drop the others; [n]."""
        lengths = torch.tensor([self.lengths[row] for row in rows], device=self.device)
        slots = torch.tensor(list(rows), device=self.device)
        self.cache.copy_columns(slots, lengths + index.to(self.device), lengths)
        for row in rows:
            self.lengths[row] += 1

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

    def reset(self, row: int) -> None:
        """Empty a slot for the next sequence."""
        self.lengths[row] = 0
        self.work[row] = Work()

    def _forward_tokens(self, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        widths = [len(ids) for ids in tokens]
        width = max(widths)
        padded = [[*ids, *([ids[-1]] * (width - len(ids)))] for ids in tokens]
        ids = torch.tensor(padded, device=self.device)  # [n, T]
        starts = torch.tensor([self.lengths[row] for row in rows], device=self.device)
        positions = starts[:, None] + torch.arange(width, device=self.device)  # [n, T]
        extent = max(self.lengths[row] for row in rows) + width
        mask = causal_mask(positions, extent)
        self._count(rows, widths, [self.lengths[row] + n / 2 for row, n in zip(rows, widths, strict=True)])
        self._set_adapter(is_branch=False)
        hidden = self._run(rows, ids, positions, positions, mask, key_positions(extent, None, positions), extent)
        for row, n in zip(rows, widths, strict=True):
            self.lengths[row] += n
        return hidden

    def _run(
        self,
        rows: Sequence[int],
        ids: Tensor,
        positions: Tensor,
        columns: Tensor,
        mask: Tensor,
        keys: Tensor,
        extent: int,
    ) -> Tensor:
        is_prefix = list(rows) == list(range(len(rows)))
        starts = {self.lengths[row] for row in rows}
        start = starts.pop() if len(starts) == 1 else None
        slots = None if is_prefix else torch.tensor(list(rows), device=self.device)
        self.cache.select(slots, columns, start, extent)
        output = self.decoder(
            input_ids=ids,
            attention_mask=layer_masks(self.config, mask, positions, keys, self.dtype),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _set_adapter(self, is_branch: bool) -> None:
        if self.adapter is not None:
            self.adapter.act(is_branch or self.adapter.scope == "always")
        elif (attached := attached_adapter(self.model)) is not None:
            attached.act(False)

    def _count(self, rows: Sequence[int], widths: Sequence[int], contexts: Sequence[float]) -> None:
        for row, width, context in zip(rows, widths, contexts, strict=True):
            work = self.work[row]
            work.forwards += 1
            work.processed += width
            work.flops += self._flops(width, context)


class _FlopCount:
    """2 x parameters x tokens (input embedding left out, output embedding in) + 4 x layers x width x attended tokens."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        total = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        tied = embedding is model.get_output_embeddings().weight  # type: ignore[operator]
        self.per_token = 2.0 * (total if tied else total - embedding.numel())
        self.per_attended = 4.0 * config.num_hidden_layers * config.hidden_size

    def __call__(self, width: int, context: float) -> float:
        return width * (self.per_token + self.per_attended * context)
