"""A preallocated KV cache of slots: row b holds its tokens in columns [0, length_b), without padding or copies.

Rows have lengths of their own; writing goes to explicit columns, cropping is forgetting, and keeping a
branch's winner copies one column. Knows nothing of tokens; refuses models whose cache is not plain attention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from s2t.errors import ModelError
from s2t.model.attention import Segment

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
                n, width = segment.shape
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
