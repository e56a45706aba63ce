"""Forwards of training on shared prefixes: one pass over a prefix, all K candidates of all its groups beside it.

Under scope `candidates` the prefix is the frozen base model's and carries no gradient; under `always` it is
the adapter's too, and gradients flow through the shared cache. Nothing of the full vocabulary is held for all positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from s2t.core.losses import lm_preserving_kl
from s2t.model.adapter import SelectorAdapter
from s2t.model.engine import Head
from s2t.model.tree import causal_mask, layer_masks
from s2t.train.dataset import Batch

_LOGITS_AT_ONCE = 2**24


@dataclass(slots=True)
class States:
    """Hidden states a batch's losses read."""

    candidates: Tensor  # [N, K, H]
    steps: Tensor  # [M, H], the state each trained step is predicted from
    base_steps: Tensor | None = None  # [M, H], the same of the base model; scope `always` only


def forward(adapter: SelectorAdapter, batch: Batch) -> States:
    """Run a batch under the adapter's scope; equals one separate forward per candidate within dtype tolerance."""
    is_always = adapter.scope == "always"
    row, column = batch.step_index
    adapter.act(False)
    with torch.no_grad():
        base, cache = _read_prefixes(adapter, batch)
    base_steps = base[row, column]
    steps = base_steps
    adapter.act(True)
    if is_always:
        hidden, cache = _read_prefixes(adapter, batch)
        steps = hidden[row, column]
    candidates = _read_candidates(adapter, batch, cache)
    return States(candidates, steps, base_steps if is_always else None)


def _read_prefixes(adapter: SelectorAdapter, batch: Batch) -> tuple[Tensor, DynamicCache]:
    """Hidden states [b, T, H] and the cache of all trajectories."""
    cache = DynamicCache()
    width = batch.ids.shape[1]
    positions = torch.arange(width, device=batch.ids.device).expand_as(batch.ids)
    hidden = _run(adapter, batch.ids, positions, causal_mask(positions, width), positions, cache)
    return hidden, cache


def _read_candidates(adapter: SelectorAdapter, batch: Batch, prefixes: DynamicCache) -> Tensor:
    """Every group's candidates on its own prefix, each seeing the prefix and itself; [N, K, H]."""
    width = int(batch.prefix_lengths.max())
    cache = DynamicCache()
    layers: list[Any] = list(prefixes.layers)
    for index, layer in enumerate(layers):
        cache.update(layer.keys[batch.group_row, :, :width], layer.values[batch.group_row, :, :width], index)
    count = batch.candidate_ids.shape[1]
    columns = torch.arange(width, device=batch.ids.device)
    prefix = columns < batch.prefix_lengths[:, None]  # [N, width]
    own = torch.eye(count, dtype=torch.bool, device=batch.ids.device).expand(len(prefix), -1, -1)
    mask = torch.cat([prefix[:, None].expand(-1, count, -1), own], dim=-1).unsqueeze(1)  # [N, 1, K, width + K]
    positions = batch.prefix_lengths[:, None].expand(-1, count)
    keys = torch.cat([columns.expand(len(prefix), -1), positions], dim=1)
    return _run(adapter, batch.candidate_ids, positions, mask, keys, cache)


def _run(
    adapter: SelectorAdapter, ids: Tensor, positions: Tensor, mask: Tensor, keys: Tensor, cache: DynamicCache
) -> Tensor:
    model = adapter.base_model
    config = model.config.get_text_config(decoder=True)
    output = model.get_decoder()(
        input_ids=ids,
        attention_mask=layer_masks(config, mask, positions, keys, model.dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return output.last_hidden_state


def lm_kl(adapter: SelectorAdapter, states: States) -> Tensor:
    """KL(base LM || adapted LM) over the trained steps, in chunks whose logits are recomputed for the backward."""
    assert states.base_steps is not None
    head = Head(adapter.base_model)
    size = max(1, _LOGITS_AT_ONCE // head.linear.weight.shape[0])
    total = states.steps.new_zeros((), dtype=torch.float32)

    def part(base: Tensor, adapted: Tensor) -> Tensor:
        return lm_preserving_kl(head(base), head(adapted)) * len(base)

    for i in range(0, len(states.steps), size):
        total = total + checkpoint(
            part, states.base_steps[i : i + size], states.steps[i : i + size], use_reentrant=False
        )
    return total / max(len(states.steps), 1)
