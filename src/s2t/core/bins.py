"""The score of a candidate: from the adapter's own next-token logits (readout `rank`), or from bins behind it (`bins`).

Under `bins` a candidate's R bin logits become one number in [0, 1]; the prior log p_S joins with weight lambda.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expected_bin(bin_logits: Tensor) -> Tensor:
    """e = sum_b softmax(z)_b b / (R - 1); [..., R] -> [...], float32, in [0, 1].

    Source: Select to Think (arXiv 2604.26940), S2T-LOCAL's continuous score over reserved tokens.
    """
    num_bins = bin_logits.shape[-1]
    levels = torch.linspace(0.0, 1.0, num_bins, device=bin_logits.device)
    return bin_logits.float().softmax(-1) @ levels


def candidate_score(bin_logits: Tensor, slm_logprobs: Tensor, temperature: float, prior_weight: float) -> Tensor:
    """score = e / temperature + lambda log p_S; [..., K, R], [..., K] -> [..., K], float32.

    With `prior_weight` 1 and constant e the order is the SLM's own; the paper has 0.
    """
    return combine(expected_bin(bin_logits) / temperature, slm_logprobs, 1.0, prior_weight)


def combine(readings: Tensor, slm_logprobs: Tensor, adapter_weight: float, prior_weight: float) -> Tensor:
    """score = w r + lambda log p_S of candidates, r the adapter's reading; [..., K], [..., K] -> [..., K], float32.

    Under readout `rank` r = log p_A, the SLM's own next-token distribution under the adapter, and lambda = 1 - w, so that w = 0,
    or an adapter that changes nothing, ranks as the SLM does; under `bins` r = e / temperature.
    """
    scores = adapter_weight * readings.float()
    return scores if prior_weight == 0 else scores + prior_weight * slm_logprobs.float()


def target_bins(llm_probs: Tensor, num_bins: int) -> Tensor:
    """Nearest bin of each probability; [..., K] in [0, 1] -> [..., K] int64 in 0..R-1."""
    return (llm_probs.clamp(0, 1) * (num_bins - 1)).round().long()
