"""Tokens that are several at once: the mean embedding of some ids in the place of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def mixed_embeddings(model: Any, ids: Tensor, mixed: Mapping[int, Sequence[int]]) -> Tensor:
    """Embeddings of a flat line of tokens [1, N], at some places the mean over several ids; [1, N, H]."""
    table = model.get_input_embeddings()
    embeddings = table(ids).clone()
    for place, several in mixed.items():
        embeddings[0, place] = table(torch.tensor(list(several), device=ids.device)).mean(0)
    return embeddings
