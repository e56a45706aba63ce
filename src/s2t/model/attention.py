"""Attention straight on the slots of the cache: segments of one forward read their rows in place, nothing is copied.

Registered with transformers' `AttentionInterface` and switched on for the engine's own forwards alone. All tokens
of a forward lie in one flat row, so that ordinary tokens, candidates of a tree and whole prompts share the matrix
products; here each segment goes back to its rows. Heads that share keys are folded into the query's length
(grouped-query attention without repeating keys or values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2t.errors import ModelError
from s2t.model.tree import causal_mask, key_positions


@dataclass(slots=True)
class Segment:
    """n neighbouring rows of the cache with T tokens each; a row sees its columns [0, extent) as far as the mask allows."""

    first: int  # row
    positions: Tensor  # [n, T]
    columns: Tensor  # [n, T], where the tokens are written
    start: int | None  # the first column, where all rows write to the same ones
    extent: int
    visible: Tensor | None = None  # bool [n, 1, T, extent]; None: everything, or causal
    is_causal: bool = False  # rows were empty: token t sees tokens 0..t
    prefix_lengths: Tensor | None = None  # [n], of a tree: columns past it stand at that very position
    rows: Tensor | None = None  # [n], where the rows are no neighbours: they are gathered
    _windowed: dict[int, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        n, width = self.positions.shape
        return n, width

    def mask(self, window: int | None) -> Tensor | None:
        """The mask of a layer that sees everything, or `window` tokens back; made once per forward."""
        if window is None or self.extent <= window:
            return self.visible
        if window not in self._windowed:
            keys = key_positions(self.extent, self.prefix_lengths, self.positions)
            near = (self.positions.unsqueeze(-1) - keys.unsqueeze(1) < window).unsqueeze(1)  # [n, 1, T, extent]
            self._windowed[window] = near & self.explicit()
        return self._windowed[window]

    def explicit(self) -> Tensor:
        """The mask without a window, spelled out."""
        return causal_mask(self.positions, self.extent) if self.visible is None else self.visible

    def take(self, store: Tensor) -> Tensor:
        """This segment's rows and columns of a store, a view where the rows are neighbours."""
        if self.rows is not None:
            return store[self.rows, :, : self.extent]
        return store[self.first : self.first + len(self.positions), :, : self.extent]

    def write(self, store: Tensor, states: Tensor) -> None:
        """Put new keys or values [n, T, heads, D] into a store [rows, heads, columns, D]."""
        n, width = self.shape
        if self.rows is not None:
            store[self.rows[:, None], :, self.columns] = states
            return
        rows = store[self.first : self.first + n]
        if self.start is not None:
            rows[:, :, self.start : self.start + width] = states.transpose(1, 2)
        else:
            rows[torch.arange(n, device=states.device)[:, None], :, self.columns] = states


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = -1,
    softcap: float | None = None,
    segments: list[Segment] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, N, D] over whole stores [rows, kv_heads, columns, D], segment by segment; [1, N, heads, D].

    A layer that names no window has the one it keeps to itself (Qwen2-MoE), if any.
    """
    if segments is None or kwargs.get("s_aux") is not None:
        raise ModelError(
            f"the attention of {type(module).__name__} cannot read cache slots; use a plain-attention model."
        )
    window = (getattr(module, "sliding_window", None) or None) if sliding_window == -1 else sliding_window
    flat = query.transpose(1, 2)[0]  # [N, heads, D]
    outputs, at = [], 0
    for segment in segments:
        n, width = segment.shape
        part = flat[at : at + n * width].unflatten(0, (n, width))  # [n, T, heads, D]
        keys, values, mask = segment.take(key), segment.take(value), segment.mask(window)
        if softcap is not None:
            mask = segment.explicit() if mask is None else mask
        outputs.append(_attend(part, keys, values, mask, segment.is_causal, scaling, softcap))
        at += n * width
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.unsqueeze(0), None


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """[n, T, heads, D] over [n, kv_heads, L, D] -> [n * T, heads, D]."""
    n, width, heads, _ = query.shape
    shared = heads // keys.shape[1]
    if mask is None and is_causal and width > 1:
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, is_causal=True, scale=scaling, enable_gqa=shared > 1
        )  # [n, heads, T, D]
        return output.transpose(1, 2).flatten(0, 1)
    if width == 1:
        folded = query.reshape(n, keys.shape[1], shared, -1)  # [n, kv_heads, shared, D]
    else:
        grouped = query.unflatten(2, (keys.shape[1], shared))  # [n, T, kv_heads, shared, D]
        folded = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [n, kv_heads, shared * T, D]
        mask = mask.repeat(1, 1, shared, 1) if mask is not None else None
    if softcap is None:
        output = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scaling)
    else:
        output = _softcapped(folded, keys, values, mask, scaling or folded.shape[-1] ** -0.5, softcap)
    if width == 1:
        return output.reshape(n, heads, -1)
    return output.unflatten(2, (shared, width)).permute(0, 3, 1, 2, 4).reshape(n * width, heads, -1)


def _softcapped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """What SDPA lacks: scores bounded by `softcap` (Gemma 2)."""
    scores = torch.tanh(query @ keys.transpose(-1, -2) * scaling / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


@cache
def _registered(function: Callable[..., Any]) -> str:
    """The name under which transformers knows an attention of ours."""
    from transformers import AttentionInterface  # brings 120 MiB of model classes, which llama.cpp does without

    name = f"s2t_{function.__name__}"
    AttentionInterface.register(name, function)
    return name


@contextmanager
def slot_attention(config: Any, function: Callable[..., Any] = attend) -> Iterator[None]:
    """Let a model's attention run on slots, or as another of ours, inside the block; its own is back afterwards."""
    own = config._attn_implementation_internal
    config._attn_implementation_internal = _registered(function)
    try:
        yield
    finally:
        config._attn_implementation_internal = own
