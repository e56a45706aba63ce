"""Attention masks: who sees whom in a forward over slot rows, for ordinary tokens and for a tree of candidates.

Masks are boolean; sliding-window layers get their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig


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
