"""The expected-bin score of a candidate, and the target bins of an LLM probability.

A candidate's R bin logits become one number in [0, 1]; the prior log p_S joins with weight lambda.
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
    scores = expected_bin(bin_logits) / temperature
    if prior_weight == 0:
        return scores
    return scores + prior_weight * slm_logprobs.float()


def target_bins(llm_probs: Tensor, num_bins: int) -> Tensor:
    """Nearest bin of each probability; [..., K] in [0, 1] -> [..., K] int64 in 0..R-1."""
    return (llm_probs.clamp(0, 1) * (num_bins - 1)).round().long()
