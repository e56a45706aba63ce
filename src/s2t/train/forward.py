"""Forwards of training on shared prefixes: one pass over a prefix, and beside it what each of its groups is read from.

That is the prefix's last token once more (readout `rank`) or all K candidates (`bins`). Under the scopes `step` and
`candidates` the prefix is the frozen base model's and carries no gradient; under `always` and `stream` it is the adapter's too,
and gradients flow through the shared cache; under `stream` steps are read from the base model's. Nothing of the full vocabulary
is held for all positions.
Frozen prefixes are the same in every epoch: `FrozenPrefixes` reads them once, if they fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from s2t.core.losses import lm_preserving_kl
from s2t.core.support import propose
from s2t.model.adapter import SelectorAdapter
from s2t.model.beside import Beside, attend_beside
from s2t.model.loaded import Head
from s2t.model.lora import trained_in_half
from s2t.model.slots import layer_masks, slot_attention
from s2t.progress import count, progress
from s2t.train.dataset import Batch, Trajectory, pad_ids
from s2t.train.processes import Processes

_LOGITS_AT_ONCE = 2**23 - 2**12  # floats, under 32 MiB: glibc maps a larger tensor anew each time
_TOKENS_AT_ONCE = 4096


class Prefixes:
    """What a batch needs of its prefixes: states of trained steps, and every group's own keys and values."""

    def __init__(self, hidden: Tensor, layers: list[tuple[Tensor, Tensor]], index: Tensor) -> None:
        self._hidden, self._layers, self._index = hidden, layers, index  # [X, H], [X, heads, D] each, [b, T] into X

    def steps(self, batch: Batch) -> Tensor:
        """The state each trained step is predicted from, [M, H]."""
        row, column = batch.step_index
        return self._hidden[self._index[row, column]]

    def last(self, batch: Batch) -> Tensor:
        """The state of every group's last prefix token, [N, H]."""
        return self._hidden[self._index[batch.group_row, batch.prefix_lengths - 1]]

    def beside(self, batch: Batch) -> Beside:
        """Keys and values of every group's prefix, and of tokens past its end; those must be masked."""
        rows = batch.group_row if (batch.group_row != batch.group_row[0]).any() else batch.group_row[:1]
        return Beside(self._layers, self._index[rows, : int(batch.prefix_lengths.max())])


@dataclass(slots=True)
class States:
    """Hidden states a batch's losses read."""

    candidates: Tensor  # [N, K, H]; under readout `rank` [N, 1, H], of the prefix's last token
    steps: Tensor  # [M, H], the state each trained step is predicted from
    base_steps: Tensor | None = None  # [M, H], the same of the base model; scope `always` only


class FrozenPrefixes:
    """Hidden states and keys and values of the base model on every trajectory, read once for all epochs.

    Chunks depend on the trajectories alone, never on the step a run resumes at, so that a resumed run computes
    with the very same numbers. Processes read chunks in turns, each through `call`, and then all of them hold all.
    """

    def __init__(
        self,
        adapter: SelectorAdapter,
        trajectories: Sequence[Trajectory],
        call: Callable[..., Any] | None = None,
        processes: Processes | None = None,
    ) -> None:
        processes = processes or Processes()
        lengths = np.array([len(t.ids) for t in trajectories])
        self._starts = torch.from_numpy(np.cumsum(lengths) - lengths).to(adapter.loaded.device)
        self._lengths = torch.from_numpy(lengths).to(adapter.loaded.device)
        self._hidden = torch.empty(0)  # [total, H]
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values, [total, heads, D] each
        adapter.act(False)
        chunks = _chunks(lengths)
        turns = [chunks[i : i + processes.count] for i in range(0, len(chunks), processes.count)]
        with torch.no_grad(), progress("read prefixes", len(trajectories), 0, processes.is_first) as advance:
            for turn in turns:
                chunk = turn[min(processes.index, len(turn) - 1)]  # in the last turn some read what another reads
                ids = pad_ids([trajectories[i] for i in chunk]).to(self._starts.device)
                hidden, cache = (call or _call)(_run_prefixes, adapter, ids)
                self._make_room(hidden, cache, int(lengths.sum()))
                if processes.index < len(turn):
                    self._keep(chunk, hidden, cache)
                advance(sum(map(len, turn)))
                count(tokens=sum(int(lengths[i]) for part in turn for i in part))
        processes.gather([self._hidden, *(tensor for layer in self._layers for tensor in layer)])

    @staticmethod
    def size(adapter: SelectorAdapter, trajectories: Sequence[Trajectory]) -> int:
        """Bytes that all trajectories take."""
        config = adapter.base_model.config.get_text_config(decoder=True)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.hidden_size + 2 * config.num_hidden_layers * config.num_key_value_heads * head
        return sum(len(t.ids) for t in trajectories) * width * adapter.base_model.dtype.itemsize

    def take(self, indices: Sequence[int]) -> Prefixes:
        """The prefixes of a batch made of those trajectories, in that order."""
        rows = torch.as_tensor(indices, device=self._starts.device)
        columns = torch.arange(int(self._lengths[rows].max()), device=rows.device)
        live = columns < self._lengths[rows, None]
        return Prefixes(self._hidden, self._layers, torch.where(live, self._starts[rows, None] + columns, 0))

    def _make_room(self, hidden: Tensor, cache: DynamicCache, total: int) -> None:
        if self._layers:
            return
        layers: list[Any] = list(cache.layers)
        self._hidden = hidden.new_zeros(total, hidden.shape[-1])
        self._layers = [
            (
                layer.keys.new_zeros(total, layer.keys.shape[1], layer.keys.shape[3]),
                layer.values.new_zeros(total, layer.values.shape[1], layer.values.shape[3]),
            )
            for layer in layers
        ]

    def _keep(self, chunk: Sequence[int], hidden: Tensor, cache: DynamicCache) -> None:
        layers: list[Any] = list(cache.layers)
        for row, index in enumerate(chunk):
            start, length = int(self._starts[index]), int(self._lengths[index])
            self._hidden[start : start + length] = hidden[row, :length]
            for (keys, values), layer in zip(self._layers, layers, strict=True):
                keys[start : start + length] = layer.keys[row, :, :length].transpose(0, 1)
                values[start : start + length] = layer.values[row, :, :length].transpose(0, 1)


def _call(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


def _chunks(lengths: np.ndarray) -> list[list[int]]:
    """Indices by length, cut so that a padded chunk stays within a fixed number of tokens."""
    chunks: list[list[int]] = [[]]
    for index in np.argsort(lengths, kind="stable").tolist():
        if chunks[-1] and (len(chunks[-1]) + 1) * lengths[index] > _TOKENS_AT_ONCE:
            chunks.append([])
        chunks[-1].append(index)
    return chunks


def forward(
    adapter: SelectorAdapter, batch: Batch, frozen: Prefixes | None = None, kept_per_group: float = 0.0
) -> States:
    """Run a batch under the adapter's scope; equals one separate forward per reading within dtype tolerance.

    `frozen` are the base model's states of the batch's trajectories where they are already known. With `kept_per_group` the
    batch gets further groups: see `_keep`.
    """
    is_always, reads_itself = adapter.scope == "always", adapter.scope in ("always", "stream")
    adapter.act(False)
    with torch.no_grad():
        prefixes = frozen if frozen is not None else _read_prefixes(adapter, batch.ids)
        base_steps = prefixes.steps(batch)
        if kept_per_group > 0:
            _keep(adapter, batch, base_steps, kept_per_group)
    adapter.act(True)
    if reads_itself:
        prefixes = _read_prefixes(adapter, batch.ids)
    steps = prefixes.steps(batch) if is_always else base_steps
    if not adapter.ranks:
        candidates = _read_beside(adapter, batch.candidate_ids, batch.prefix_lengths, prefixes.beside(batch))
    elif reads_itself:
        candidates = prefixes.last(batch)[:, None]
    else:
        candidates = _read_beside(adapter, batch.last_ids[:, None], batch.prefix_lengths - 1, prefixes.beside(batch))
    return States(candidates, steps, base_steps if is_always else None)


def _keep(adapter: SelectorAdapter, batch: Batch, base_steps: Tensor, per_group: float) -> None:
    """Add to the batch as groups the steps that look most critical and are not, with the SLM's own order as target.

    Every trajectory has `per_group` for each group of its own. There the two models agree within the divergence threshold,
    so p_S stands for p_L, and no LLM is asked. Without them a selector learns from divergence points alone, and flips where
    the trigger has fired for nothing.
    """
    values = adapter.selector.criticality_logits(base_steps)  # [M]
    parts = []
    for row, groups in enumerate(torch.bincount(batch.group_row).tolist()):
        own = ((batch.step_index[0] == row) & ~batch.is_critical).nonzero()[:, 0]
        parts.append(own[values[own].topk(min(round(per_group * groups), len(own))).indices])
    places = torch.cat(parts)  # [n]
    head = adapter.head(base_steps[places])[..., : adapter.loaded.vocab_size]
    forbidden = torch.tensor([i for i in adapter.reserved.all if i < head.shape[-1]], device=head.device).long()
    ids, logprobs = propose(head.index_fill(-1, forbidden, float("-inf")), batch.candidate_ids.shape[1])
    rows, columns = batch.step_index[:, places]
    batch.candidate_ids = torch.cat([batch.candidate_ids, ids])
    batch.slm_logprobs = torch.cat([batch.slm_logprobs, logprobs])
    batch.llm_probs = torch.cat([batch.llm_probs, logprobs.exp()])
    batch.group_row = torch.cat([batch.group_row, rows])
    batch.prefix_lengths = torch.cat([batch.prefix_lengths, columns + 1])
    batch.last_ids = torch.cat([batch.last_ids, batch.step_ids[places]])


def _read_prefixes(adapter: SelectorAdapter, ids: Tensor) -> Prefixes:
    hidden, cache = _run_prefixes(adapter, ids)
    layers: list[Any] = list(cache.layers)
    flat = [(x.keys.transpose(1, 2).flatten(0, 1), x.values.transpose(1, 2).flatten(0, 1)) for x in layers]
    return Prefixes(hidden.flatten(0, 1), flat, torch.arange(ids.numel(), device=ids.device).view_as(ids))


def _run_prefixes(adapter: SelectorAdapter, ids: Tensor) -> tuple[Tensor, DynamicCache]:
    """Hidden states [b, T, H] and the cache of right-padded trajectories `ids` [b, T]; what padding reads is never looked at."""
    cache = DynamicCache()
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return _run(adapter, ids, positions, None, past_key_values=cache, use_cache=True), cache


def _read_beside(adapter: SelectorAdapter, ids: Tensor, lengths: Tensor, beside: Beside) -> Tensor:
    """K tokens of every group at the position behind its prefix, each seeing the prefix and itself; [N, K] -> [N, K, H].

    `lengths` [N] are the tokens that belong to each prefix.
    """
    positions = lengths[:, None].expand_as(ids)
    columns = torch.arange(beside.index.shape[1], device=ids.device).expand(len(ids), -1)
    seen = (columns < lengths[:, None])[:, None, None].expand(-1, 1, ids.shape[1], -1)  # [N, 1, K, T]
    config = adapter.base_model.get_decoder().config.get_text_config(decoder=True)
    with slot_attention(config, attend_beside):
        masks = layer_masks(config, seen, positions, columns)
        return _run(adapter, ids, positions, masks, beside=beside, use_cache=False)


def _run(adapter: SelectorAdapter, ids: Tensor, positions: Tensor, masks: Any, **others: Any) -> Tensor:
    """Last hidden states of one forward; without masks it is causal."""
    model = adapter.base_model
    with trained_in_half(model, adapter.layers):
        output = model.get_decoder()(input_ids=ids, attention_mask=masks, position_ids=positions, **others)
    return output.last_hidden_state


def lm_kl(adapter: SelectorAdapter, states: States) -> Tensor:
    """KL(base LM || adapted LM) over the trained steps, in chunks whose logits are recomputed for the backward."""
    assert states.base_steps is not None
    head = Head(adapter.base_model)

    def part(base: Tensor, adapted: Tensor) -> Tensor:
        return lm_preserving_kl(head(base), head(adapted)) * len(base)

    return sum_in_chunks(part, head, states.base_steps, states.steps) / max(len(states.steps), 1)


def sum_in_chunks(part: Callable[..., Tensor], head: Head, *tensors: Tensor) -> Tensor:
    """Sum of a scalar function of rows, [N, ...] each -> [], float32; logits of few rows are held at a time.

    Where there is more than one chunk its logits are computed again for the backward.
    """
    size = max(1, _LOGITS_AT_ONCE // head.linear.weight.shape[0])
    total = tensors[0].new_zeros((), dtype=torch.float32)
    if len(tensors[0]) <= size:
        return total + part(*tensors) if len(tensors[0]) else total
    for chunk in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        total = total + checkpoint(part, *chunk, use_reentrant=False)
    return total
