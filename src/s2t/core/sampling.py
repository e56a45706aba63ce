"""Sampling filters and inverse-CDF sampling from explicit uniforms.

A sequence's uniforms are drawn once from (seed, key), so a sample does not depend on the batch it ran in
and a resumed run draws the same tokens.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_LIKELY = 1024


def uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """`count` uniforms in [0, 1) that depend on (seed, key) alone; float64 [count]."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random(count)


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Apply temperature, then top-k, top-p and min-p, each on what the one before left; [B, V] -> [B, V].

    0 turns top-k off, 1 turns top-p off, 0 turns min-p off. The best token always stays.
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        logits = _nucleus(logits, top_p)
    if min_p > 0:
        best = logits.max(-1, keepdim=True).values
        logits = logits.masked_fill(logits < best + float(np.log(min_p)), float("-inf"))
    return logits


def _nucleus(logits: Tensor, top_p: float, num_likely: int = _LIKELY) -> Tensor:
    """The fewest likeliest tokens that hold top_p, the first of equal ones; all else at -inf.

    Where the nucleus goes as low as the last of the `num_likely` (to its equals, perhaps), the row is sorted whole.
    """
    ids = logits.topk(min(num_likely, logits.shape[-1]), dim=-1).indices.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    probs = (values - logits.logsumexp(-1, keepdim=True)).exp()
    is_out = probs.cumsum(-1) - probs >= top_p
    held = values.masked_fill(is_out, float("-inf"))
    kept = torch.full_like(logits, float("-inf")).scatter(-1, ids.gather(-1, order), held)
    is_flat = values.masked_fill(is_out, float("inf")).amin(-1) <= values[..., -1]
    if num_likely < logits.shape[-1] and is_flat.any():
        kept[is_flat] = _nucleus(logits[is_flat], top_p, logits.shape[-1])
    return kept


def sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by inverse CDF; [B, V], [B] in [0, 1) -> [B] int64; never a token at -inf."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    target = uniform.to(cdf).unsqueeze(-1) * cdf[..., -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
