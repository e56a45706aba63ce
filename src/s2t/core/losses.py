"""Losses of the selector (cross-entropy, pairwise margin, listwise KL over candidates, KL to the base LM, criticality) and of
distillation (KL to the LLM on buckets).

All take what the model produced and what the LLM said, in float32, and return one mean or sum. No model here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from s2t.core.support import bucket_logprobs


def selection_cross_entropy(scores: Tensor, llm_probs: Tensor) -> Tensor:
    """CE of the softmax over candidate scores against argmax p_L on the candidates; [G, K], [G, K] -> []."""
    return F.cross_entropy(scores, llm_probs.argmax(-1))


def pairwise_margin(expected: Tensor, llm_probs: Tensor, margin: float) -> Tensor:
    """Mean hinge: the LLM's candidate must beat every other one's expected bin by `margin`; [G, K], [G, K] -> []."""
    best = llm_probs.argmax(-1, keepdim=True)
    gap = expected.gather(-1, best) - expected  # [G, K]
    loss = (margin - gap).clamp_min(0.0).scatter(-1, best, 0.0)
    return loss.sum(-1).div(max(expected.shape[-1] - 1, 1)).mean()


def listwise_kl(scores: Tensor, llm_probs: Tensor) -> Tensor:
    """KL(p_L renormalised on the candidates || softmax of scores), nats; [G, K], [G, K] -> []."""
    return F.kl_div(scores.log_softmax(-1), _on_candidates(llm_probs), reduction="batchmean")


def listwise_cross_entropy(scores: Tensor, llm_probs: Tensor) -> Tensor:
    """Cross-entropy of softmax(scores) under p_L renormalised on the candidates, nats, mean; [G, K], [G, K] -> []."""
    return -(_on_candidates(llm_probs) * scores.log_softmax(-1)).sum(-1).mean()


def _on_candidates(llm_probs: Tensor) -> Tensor:
    """p_L renormalised on the candidates; [G, K] -> [G, K]."""
    return llm_probs / llm_probs.sum(-1, keepdim=True).clamp_min(1e-12)


def lm_preserving_kl(base_logits: Tensor, adapted_logits: Tensor) -> Tensor:
    """KL(base LM || adapted LM) in nats, mean over positions; [T, V], [T, V] -> []."""
    return F.kl_div(
        adapted_logits.float().log_softmax(-1),
        base_logits.float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


def criticality_loss(logits: Tensor, labels: Tensor, positive_weight: float) -> Tensor:
    """Class-weighted binary cross-entropy over all steps, 0 over none; logits [N], labels [N] in {0, 1} -> []."""
    if not labels.numel():
        return logits.float().sum()
    weight = torch.tensor(positive_weight, device=logits.device)
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=weight)


def distillation_kl(logits: Tensor, ids: Tensor, llm_probs: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_L || p_S) on listed tokens and one rest bucket, nats, summed over positions; [N, V], [N, S], [N, S + 1] -> [].

    `llm_probs` are the LLM's at the same temperature T, the rest last; p_S is the softmax of `logits` / T over all of its rows.
    A lower bound of the KL over the whole vocabulary, and equal to it where S covers all that the LLM may say.
    Source: token-level knowledge distillation (arXiv 1503.02531), with the rest bucket of the divergence.
    """
    slm_logprobs = bucket_logprobs(logits.float() / temperature, ids)
    probs = llm_probs.float()[..., : slm_logprobs.shape[-1]]
    return temperature**2 * (torch.xlogy(probs, probs) - probs * slm_logprobs).sum()
