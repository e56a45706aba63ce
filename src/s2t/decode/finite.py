"""Numbers of a model that are none (NaN, infinity) end the work with one line that names it, before they pass for a result.

Each check looks at values that come to the host anyway, so it costs no wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from s2t.core.support import best_ids
from s2t.model.checkpoint import not_finite


def best_tokens(logits: Tensor, name: str) -> list[int]:
    """The likeliest token of each row; [n, V] -> n. Raises ModelError where a row holds NaN or infinity, or nothing but -inf."""
    best = best_ids(logits)[:, None]  # of a NaN, where there is one
    tokens = torch.where(logits.gather(-1, best).isfinite(), best, -1)[:, 0].tolist()
    if min(tokens, default=0) < 0:
        raise not_finite(name)
    return tokens


def numbers(values: list[float], name: str) -> list[float]:
    """The values, which were read from a model; raises ModelError where one is NaN."""
    if any(map(math.isnan, values)):
        raise not_finite(name)
    return values


def check_numbers(columns: Iterable[np.ndarray], name: str) -> None:
    """Raise ModelError where one of some arrays that were read from a model holds NaN."""
    if any(np.isnan(column).any() for column in columns):
        raise not_finite(name)
