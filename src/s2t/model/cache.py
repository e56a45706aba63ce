"""A preallocated KV cache of slots: row b holds its tokens in columns [0, length_b), without padding or copies.

Rows have lengths of their own; writing goes to explicit columns, cropping is forgetting, and keeping a
branch's winner copies one column. Knows nothing of tokens; refuses models whose cache is not plain attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from s2t.errors import ModelError

GROWTH = 128  # columns are allocated in multiples of this

_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})


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
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type} is an encoder-decoder; a decoder-only causal LM is needed.")


class SlotView:
    """Which rows and columns the current forward writes and reads; one object shared by all layers.

    `rows` None means rows 0..n-1 (a view, no copy); `start` is set when all rows write at the same column.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.columns: Tensor = torch.empty(0, 0, dtype=torch.long)  # [n, T]
        self.start: int | None = None
        self.extent = 0


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [max_rows, heads, capacity, head_dim], allocated at first use and grown in steps."""

    is_sliding = False
    is_croppable = True

    def __init__(self, view: SlotView, max_rows: int) -> None:
        super().__init__()
        self.view = view
        self.max_rows = max_rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_zeros(self._shape(key_states, 0))
        self.values = value_states.new_zeros(self._shape(value_states, 0))
        self.is_initialized = True

    def _shape(self, states: Tensor, capacity: int) -> tuple[int, int, int, int]:
        return self.max_rows, states.shape[1], capacity, states.shape[3]

    def _ensure(self, extent: int) -> None:
        assert self.keys is not None and self.values is not None
        held = self.keys.shape[2]
        if extent <= held:
            return
        capacity = -(-max(extent, held + held // 2) // GROWTH) * GROWTH
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(self._shape(old, capacity))
            new[:, :, :held] = old
            setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._ensure(self.view.extent)
        assert self.keys is not None and self.values is not None
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def _write(self, store: Tensor, states: Tensor) -> Tensor:
        view, count, width = self.view, states.shape[0], states.shape[2]
        if view.rows is None:
            rows = store[:count]
            if view.start is not None:
                rows[:, :, view.start : view.start + width] = states
            else:
                index = torch.arange(count, device=states.device)[:, None]
                rows[index, :, view.columns] = states.transpose(1, 2)
            return rows[:, :, : view.extent]
        store[view.rows[:, None], :, view.columns] = states.transpose(1, 2)
        return store[view.rows, :, : view.extent]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view.extent, 0

    def get_seq_length(self) -> int:
        return self.view.extent

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class SlotCache(Cache):
    """The cache of all layers; every forward first calls `select` with its rows and columns."""

    def __init__(self, num_layers: int, max_rows: int) -> None:
        self.view = SlotView()
        super().__init__(layers=[SlotLayer(self.view, max_rows) for _ in range(num_layers)])

    def select(self, rows: Tensor | None, columns: Tensor, start: int | None, extent: int) -> None:
        """Direct the next forward at `rows` (None: rows 0..n-1) and `columns` [n, T]; reads see [0, extent)."""
        self.view.rows, self.view.columns, self.view.start, self.view.extent = rows, columns, start, extent

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
