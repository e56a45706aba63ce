"""Attention of training: a few tokens of every group, each beside a prefix, whose keys and values stay as they lie, and itself.

Nothing is joined or copied for groups of one prefix, and no gradient is computed for a frozen prefix. Plain products: what SDPA
does for so few queries is slower on a CPU, ten times in half precision when gradients go back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2t.errors import ModelError


@dataclass(slots=True)
class Beside:
    """Keys and values of prefixes in each layer, [X, kv_heads, D], and where those of each row lie, [N, T], or of all, [1, T]."""

    layers: Sequence[tuple[Tensor, Tensor]]
    index: Tensor

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [N or 1, kv_heads, T, D] each."""
        keys, values = self.layers[layer]
        return keys[self.index].transpose(1, 2), values[self.index].transpose(1, 2)


def attend_beside(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    beside: Beside | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [N, heads, K, D], key and value [N, kv_heads, K, D] of tokens, mask [N, 1, K, T] of prefixes; [N, K, heads, D]."""
    if beside is None or attention_mask is None or kwargs.get("s_aux") is not None:
        raise ModelError(
            f"the attention of {type(module).__name__} cannot read beside a prefix; use a plain-attention model."
        )
    keys, values = beside.of(module.layer_idx)  # type: ignore[arg-type]
    width = keys.shape[2]
    queries = query.mul(scaling or query.shape[-1] ** -0.5).unflatten(
        1, (key.shape[1], -1)
    )  # [N, kv_heads, shared, K, D]
    before = _times(queries, keys.transpose(-1, -2))  # [N, kv_heads, shared, K, T]
    own = (queries.float() * key.unsqueeze(2).float()).sum(-1, keepdim=True)  # a token sees no other of its group
    scores = torch.cat([before, own.to(before.dtype)], dim=-1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hidden = nn.functional.pad(~attention_mask.unsqueeze(2), (0, 1))  # itself is always seen
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    output = _times(weights[..., :width], values) + weights[..., width:] * value.unsqueeze(2)
    return output.flatten(1, 2).transpose(1, 2).contiguous(), None


def _times(left: Tensor, right: Tensor) -> Tensor:
    """[N, kv_heads, shared, K, a] times [N or 1, kv_heads, a, b]; one product for all rows where they share the right side."""
    n, _, shared, count, _ = left.shape
    if right.shape[0] == n:
        return (left.flatten(2, 3) @ right).unflatten(2, (shared, count))
    product = left.transpose(0, 1).flatten(1, 3) @ right[0]  # [kv_heads, N * shared * K, b]
    return product.unflatten(1, (n, shared, count)).transpose(0, 1)
