"""Candidate proposal from logits, and the masking that keeps reserved ids from ever being generated.

Knows neither where logits come from nor how a candidate is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2t.core.support import in_parts
from s2t.errors import ConfigError


def mask_forbidden(logits: Tensor, forbidden_ids: Tensor, vocab_size: int) -> Tensor:
    """Float32 logits with forbidden ids and padding rows at -inf; [..., V] -> [..., vocab_size].

    `forbidden_ids` are the reserved ids; rows at or past `vocab_size` belong to no token and are cut off.
    """
    logits = logits[..., :vocab_size].float()
    if forbidden_ids.numel():
        logits = logits.index_fill(-1, forbidden_ids, float("-inf"))
    return logits


def propose(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The K most likely ids, best first, with their log-probabilities, float32; [B, V] of any precision -> ([B, K], [B, K]).

    The first candidate is the `argmax` (ties to the lower id), so `K = 1` is greedy. K is limited to the tokens that can
    be generated at all only by the caller; raises ConfigError when K exceeds V.
    """
    size = logits.shape[-1]
    if not 1 <= num_candidates <= size:
        raise ConfigError(
            f"num_candidates must be 1..{size} (the vocabulary size), got {num_candidates}; lower --num-candidates."
        )
    values, ids = logits.topk(num_candidates, dim=-1)
    values, ids = argmax_first(logits, values, ids, best_ids(logits).unsqueeze(-1))
    return ids, values.float() - in_parts(_total, logits)


def _total(logits: Tensor) -> Tensor:
    """[..., V], of any precision -> [..., 1], float32."""
    return logits.float().logsumexp(-1, keepdim=True)


def best_ids(logits: Tensor) -> Tensor:
    """The likeliest id of each row, ties to the lower one, a NaN before all; [..., V] -> [...].

    On a CPU numpy finds it, which takes a tenth of torch's time over 152,000 numbers; in half precision `max` is the quick one.
    """
    if logits.dtype != torch.float32:
        return logits.max(-1).indices
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.detach().numpy().argmax(-1, keepdims=True))[..., 0]
    return logits.argmax(-1)


def argmax_first(logits: Tensor, values: Tensor, ids: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """`topk` may order equal logits in any way; put the argmax `best` [..., 1] first so that greedy is always candidate 0."""
    if torch.equal(ids[..., :1], best):
        return values, ids
    ids, values = ids.clone(), values.clone()
    present = ids == best
    first = ids[..., :1].clone()
    ids = torch.where(present, first, ids)
    ids[..., :1] = best
    return values, ids


def logprobs_at(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of listed ids; [n, V] of any precision, [n, K] -> [n, K], float32."""
    return logits.gather(-1, ids).float() - in_parts(_total, logits)
