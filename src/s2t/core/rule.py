"""The rule of one step, once: does it trigger, what is a candidate's score, which one wins, is the sequence over.

The engine's loop, the client of a server and the logits processor inside a server all call these, on tensors or on plain numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor


def fires(values: Any, threshold: float) -> Any:
    """Whether a trigger's value passes its threshold; one number, or a tensor of them."""
    return values > threshold


def criticality(difference: Tensor, scale: float = 1.0) -> Tensor:
    """sigmoid of z_yes - z_no (or of a head's logit), in [0, 1]; `scale` is what the model puts on its logits."""
    return torch.sigmoid(difference / scale if scale != 1.0 else difference)


def expected_bin(bin_logits: Tensor, scale: float = 1.0) -> Tensor:
    """e = sum_b softmax(z)_b b / (R - 1); [..., R] -> [...], in [0, 1], float32 (float64 stays).

    Log-probabilities do as well as logits. Source: Select to Think (arXiv 2604.26940), S2T-LOCAL's continuous score over
    reserved tokens.
    """
    logits = bin_logits if bin_logits.dtype == torch.float64 else bin_logits.float()
    levels = torch.linspace(0.0, 1.0, logits.shape[-1], device=logits.device, dtype=logits.dtype)
    return (logits / scale if scale != 1.0 else logits).softmax(-1) @ levels


def score(reading: Any, slm_logprob: Any, adapter_weight: float, prior_weight: float) -> Any:
    """w r + lambda log p_S of a candidate, r the adapter's reading; numbers, or tensors [..., K], float32.

    Under readout `rank` r = log p_A, the SLM's own next-token distribution under the adapter, and lambda = 1 - w, so that w = 0,
    or an adapter that changes nothing, ranks as the SLM does; under `bins` r = e / temperature. A prior of weight 0 is not read:
    it may be -inf.
    """
    own = adapter_weight * (reading.float() if isinstance(reading, Tensor) else reading)
    if prior_weight == 0:
        return own
    return own + prior_weight * (slm_logprob.float() if isinstance(slm_logprob, Tensor) else slm_logprob)


def winner(scores: Tensor | Iterable[float | None]) -> Any:
    """The place of the highest score, [..., K] -> [...], or of numbers -> int; ties go to the earlier one.

    A score that is not known (NaN in a tensor, None among numbers) never wins.
    """
    if isinstance(scores, Tensor):
        return scores.nan_to_num(nan=float("-inf"), neginf=float("-inf")).argmax(-1)
    known = [(value, -place) for place, value in enumerate(scores) if value is not None]
    return -max(known)[1]


def finish_reason(is_stop: bool, num_written: int, limit: int) -> Literal["stop", "length"] | None:
    """Why a sequence ends with the token just written, if it does: a stop comes before the limit."""
    if is_stop:
        return "stop"
    return "length" if num_written >= limit else None
