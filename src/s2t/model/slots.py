"""Slots: a preallocated KV cache, row b's tokens in columns [0, length_b), and attention straight on it.

Rows have lengths of their own; writing goes to explicit columns, cropping is forgetting, keeping a branch's winner copies one
column. All tokens of a forward lie in one flat row, so that ordinary tokens, candidates of a tree and whole prompts share the
matrix products; in the attention each segment goes back to its rows, which are read in place. Heads that share keys are folded
into the query's length (grouped-query attention without repeating keys or values). Knows nothing of tokens; refuses models whose
cache is not plain attention.
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
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from s2t.errors import ModelError

GROWTH = 128  # columns are allocated in multiples of this
_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})
_OWN_MASKS = {"doge"}  # model types whose masks say more than what came before, and how near


def check_cacheable(config: PreTrainedConfig) -> None:
    """Raise ModelError for models whose cache cannot be branched and cropped (state-space or linear attention layers)."""
    config = config.get_text_config(decoder=True)
    listed = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kinds = set(listed or ["full_attention"])
    if not kinds <= _ATTENTION_TYPES:
        raise ModelError(
            f"{config.model_type} has {', '.join(sorted(kinds - _ATTENTION_TYPES))} layers, whose cache cannot be branched "
            "or cropped; use a model with plain attention layers."
        )
    if config.model_type in _OWN_MASKS:
        raise ModelError(
            f"{config.model_type} masks tokens by their values, which cannot be read from cache slots; use a model with plain "
            "attention layers."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type} is an encoder-decoder; a decoder-only causal LM is needed.")


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
        n, width = self.positions.shape
        if self.rows is not None:
            store[self.rows[:, None], :, self.columns] = states
            return
        rows = store[self.first : self.first + n]
        if self.start is not None:
            rows[:, :, self.start : self.start + width] = states.transpose(1, 2)
        else:
            rows[torch.arange(n, device=states.device)[:, None], :, self.columns] = states


def causal_mask(positions: Tensor, extent: int) -> Tensor:
    """Token at position p sees columns [0, p]; positions [n, T] -> bool [n, 1, T, extent]."""
    columns = torch.arange(extent, device=positions.device)
    return (columns <= positions.unsqueeze(-1)).unsqueeze(1)


def tree_mask(lengths: Tensor, columns: Tensor, extent: int) -> Tensor:
    """A candidate sees its row's prefix [0, length) and itself, at its own column.

    lengths [n], columns [n, K] -> bool [n, 1, K, extent]
    """
    every = torch.arange(extent, device=lengths.device)
    prefix = every[None, None, :] < lengths[:, None, None]  # [n, 1, extent]
    return (prefix | (every == columns.unsqueeze(-1))).unsqueeze(1)


def key_positions(extent: int, lengths: Tensor | None, like: Tensor) -> Tensor:
    """Position of each key column; in a tree forward all columns from `length` on stand at position `length`."""
    columns = torch.arange(extent, device=like.device).expand(like.shape[0], extent)
    return columns if lengths is None else columns.minimum(lengths[:, None])


def layer_masks(config: PreTrainedConfig, mask: Tensor, query_positions: Tensor, keys: Tensor):
    """A boolean mask as a model hands it to its attention: one tensor, or one per layer type where some layers slide.

    `keys` [n, extent] are key positions; a sliding layer sees keys less than `sliding_window` behind. A model
    that has a window and lists no layer types slides in every layer, as in transformers.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if "sliding_attention" not in kinds or window is None:
        return mask
    near = (query_positions.unsqueeze(-1) - keys.unsqueeze(1) < window).unsqueeze(1)  # [n, 1, T, extent]
    if not getattr(config, "layer_types", None):
        return mask & near
    return {"full_attention": mask, "sliding_attention": mask & near}


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
        n, width = segment.positions.shape
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


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [max_rows, heads, capacity, head_dim], allocated at first use and grown in steps."""

    is_sliding = False
    is_croppable = True

    def __init__(self, segments: list[Segment], max_rows: int) -> None:
        super().__init__()
        self.segments = segments
        self.max_rows = max_rows
        self._reserved = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in (("keys", key_states), ("values", value_states)):
            setattr(self, name, states.new_zeros(self.max_rows, states.shape[1], 0, states.shape[3]))
        self.is_initialized = True

    def reserve(self, columns: int) -> None:
        """Hold at least so many columns from now on, or from the first use on."""
        self._reserved = columns
        if self.is_initialized:
            self._ensure(columns)

    def _ensure(self, extent: int) -> None:
        assert self.keys is not None and self.values is not None
        held = self.keys.shape[2]
        if extent <= held:
            return
        capacity = max(self._reserved, -(-extent // GROWTH) * GROWTH)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(self.max_rows, old.shape[1], capacity, old.shape[3])
            new[:, :, :held] = old
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [1, heads, N, D] to the segments' places; returns the whole stores, which `attend` reads in place."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._ensure(max(segment.extent for segment in self.segments))
        assert self.keys is not None and self.values is not None
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            flat, at = states.transpose(1, 2)[0], 0  # [N, heads, D]
            for segment in self.segments:
                n, width = segment.positions.shape
                segment.write(store, flat[at : at + n * width].unflatten(0, (n, width)))
                at += n * width
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return max((segment.extent for segment in self.segments), default=0)

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class SlotCache(Cache):
    """The cache of all layers; `segments` says which rows and columns the current forward writes and reads."""

    def __init__(self, num_layers: int, max_rows: int) -> None:
        self.segments: list[Segment] = []  # one list, shared by all layers
        self._reserved = 0
        super().__init__(layers=[SlotLayer(self.segments, max_rows) for _ in range(num_layers)])

    @property
    def num_bytes(self) -> int:
        """Memory of all layers' keys and values."""
        return sum(store.numel() * store.itemsize for pair in self._stores() for store in pair)

    @property
    def capacity(self) -> int:
        """Columns held, or to be held once there is a first layer's shape."""
        stores = self._stores()
        return max(stores[0][0].shape[2], self._reserved) if stores else self._reserved

    def reserve(self, columns: int) -> None:
        """Hold at least so many columns, so that the stores stay where they are until a row is longer."""
        self._reserved = max(self._reserved, -(-columns // GROWTH) * GROWTH)
        layers: list[Any] = list(self.layers)
        for layer in layers:
            layer.reserve(self._reserved)

    def copy_columns(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Keep a branch's winner: copy column source[i] of row rows[i] to target[i]; all [n]."""
        for keys, values in self._stores():
            keys[rows, :, target] = keys[rows, :, source]
            values[rows, :, target] = values[rows, :, source]

    def copy_rows(self, source: list[int], target: list[int], length: int) -> None:
        """Copy the first `length` columns of rows `source` to rows `target`."""
        for keys, values in self._stores():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def _stores(self) -> list[tuple[Tensor, Tensor]]:
        stores = []
        layers: list[Any] = list(self.layers)
        for layer in layers:
            if layer.keys is not None and layer.values is not None:
                stores.append((layer.keys, layer.values))
        return stores


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
