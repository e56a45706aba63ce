"""The SLM's candidates, distances between the two models' next-token distributions, and where the LLM's choice stands in the
SLM's order.

Works on logits of any leading shape. The two vocabularies share their token ids; rows of padding at the
end may differ in number. Knows no model, no threshold, and not how a candidate is chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from s2t.errors import ConfigError

_LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}  # floats, keyed by device type
_FAR = -200.0  # below the likeliest token, in nats: its exponential is 0 in float32


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
    ids = argmax_first(logits.topk(num_candidates, dim=-1).indices, best_ids(logits).unsqueeze(-1))
    return ids, logprobs_at(logits, ids)


def best_ids(logits: Tensor) -> Tensor:
    """The likeliest id of each row, ties to the lower one, a NaN before all; [..., V] -> [...].

    On a CPU numpy finds it, which takes a tenth of torch's time over 152,000 numbers; in half precision `max` is the quick one.
    """
    if logits.dtype != torch.float32:
        return logits.max(-1).indices
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.detach().numpy().argmax(-1, keepdims=True))[..., 0]
    return logits.argmax(-1)


def argmax_first(ids: Tensor, best: Tensor) -> Tensor:
    """`topk` may order equal logits in any way; put the argmax `best` [..., 1] first so that greedy is always candidate 0."""
    if torch.equal(ids[..., :1], best):
        return ids
    ids = torch.where(ids == best, ids[..., :1], ids)
    ids[..., :1] = best
    return ids


def logprobs_at(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of listed ids; [n, V] of any precision, [n, K] -> [n, K], float32."""
    totals = in_parts(lambda rows: rows.float().logsumexp(-1, keepdim=True), logits)  # [n, 1]
    return logits.gather(-1, ids).float() - totals


def align_vocabulary(logits: Tensor, size: int) -> Tensor:
    """Crop or pad (-inf) the last dimension to `size`, so that padded vocabularies compare; [..., V'] -> [..., size]."""
    if logits.shape[-1] >= size:
        return logits[..., :size]
    return torch.nn.functional.pad(logits, (0, size - logits.shape[-1]), value=float("-inf"))


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats along the last dimension, >= 0; q is floored at 1e-12 so that the value stays finite."""
    q = q.clamp_min(1e-12)
    terms = torch.where(p > 0, p * (p.clamp_min(1e-38).log() - q.log()), torch.zeros_like(p))
    return terms.sum(-1).clamp_min(0.0)


def divergence(
    llm_logits: Tensor, slm_logits: Tensor, support_size: int = 64, kind: str = "llm-slm", support: str = "slm-top"
) -> Tensor:
    """Disagreement of the two next-token distributions in nats; [..., V'], [..., V] -> [...], float32, >= 0.

    `llm-slm` is KL(llm || slm) on the SLM's top `support_size` tokens plus one rest bucket that keeps the
    mass outside, so a token the SLM does not propose still counts; a lower bound of the full KL. `slm-llm`
    turns the direction, `js` is the Jensen-Shannon divergence on the same buckets. Under support `llm-top` the
    buckets are the LLM's likeliest tokens and the rest: what a server that runs the LLM tells. `released-code` is the
    original script's: tokens with p_L <= 1e-12 dropped, both renormalised, full vocabulary.

    Raises ConfigError for an unknown kind or support.
    Source: Select to Think (arXiv 2604.26940), the trigger; the rest bucket is ours.
    """
    llm_logits = align_vocabulary(llm_logits, slm_logits.shape[-1])
    if kind == "released-code":
        return _masked_divergence(llm_logits, slm_logits)
    if support not in ("slm-top", "llm-top"):
        raise ConfigError(f"support must be slm-top or llm-top; got {support!r}.")
    support_size = min(support_size, slm_logits.shape[-1])
    top = (slm_logits if support == "slm-top" else llm_logits).topk(support_size, dim=-1)  # [..., S]
    llm_probs, slm_probs = (Distribution(logits.float()).buckets(top.indices) for logits in (llm_logits, slm_logits))
    return bucket_divergence(llm_probs, slm_probs, kind)


def bucket_divergence(llm_probs: Tensor, slm_probs: Tensor, kind: str = "llm-slm") -> Tensor:
    """The divergence of two distributions over the same buckets, nats; [..., S + 1] each -> [...]."""
    if kind == "llm-slm":
        return kl_divergence(llm_probs, slm_probs)
    if kind == "slm-llm":
        return kl_divergence(slm_probs, llm_probs)
    if kind == "js":
        middle = 0.5 * (llm_probs + slm_probs)
        return 0.5 * (kl_divergence(llm_probs, middle) + kl_divergence(slm_probs, middle))
    raise ConfigError(f"divergence must be llm-slm, slm-llm, js or released-code; got {kind!r}.")


def resolve_support(support: str, support_size: int, kind: str, num_listed: int | None) -> tuple[str, int]:
    """Support and its size where an LLM tells its `num_listed` likeliest tokens alone (None: all of them).

    `auto` is slm-top for an LLM that is known in full, else llm-top. Raises ConfigError for what such an LLM cannot give.
    """
    if num_listed is None:
        return ("slm-top" if support == "auto" else support), support_size
    if support == "slm-top" or kind == "released-code":
        what = "support slm-top" if support == "slm-top" else f"divergence {kind}"
        raise ConfigError(
            f"{what} needs the LLM's whole distribution, and a server tells its {num_listed} likeliest tokens; pass "
            "--support llm-top and another --divergence, or run the LLM in this process."
        )
    return "llm-top", min(support_size, num_listed)


def spread(ids: Tensor, logprobs: Tensor, size: int) -> Tensor:
    """Log-probabilities of a whole vocabulary from those of its likeliest tokens; [n, S], [n, S] -> [n, size], float32.

    What the listed tokens leave is shared equally by all others, so that listed tokens and rest keep their
    probabilities, and no other comes before a listed one. A rest below 1e-6 is lost in the rounding of the listed ones. Ids
    outside 0..size - 1 are passed over.
    """
    known = (ids >= 0) & (ids < size)
    rest = -torch.expm1(logprobs.float().logsumexp(-1).clamp_max(0.0))  # [n]
    others = (size - known.sum(-1)).clamp_min(1)  # [n]
    least = torch.where(ids >= 0, logprobs, float("inf")).min(-1).values  # [n]
    share = torch.minimum((rest / others).log(), least)  # [n]
    filled = share[:, None].expand(-1, size + 1).clone()  # one column for ids that are passed over
    filled.scatter_(-1, torch.where(known, ids, size), logprobs)
    return filled[:, :size]


def bucket_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Logarithms of `Distribution.buckets`, fit for gradients; [..., V], [..., S] -> [..., S + 1], or [..., S] where S = V.

    The listed ids must differ from each other.
    """
    logits = logits.float()
    listed = logits.gather(-1, ids)
    if ids.shape[-1] < logits.shape[-1]:
        rest = logits.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        listed = torch.cat([listed, rest], dim=-1)
    return listed.log_softmax(-1)


def _masked_divergence(llm_logits: Tensor, slm_logits: Tensor) -> Tensor:
    llm_probs, slm_probs = llm_logits.float().softmax(-1), slm_logits.float().softmax(-1)
    keep = llm_probs > 1e-12
    llm_probs, slm_probs = llm_probs * keep, slm_probs * keep
    return kl_divergence(
        llm_probs / llm_probs.sum(-1, keepdim=True),
        slm_probs / slm_probs.sum(-1, keepdim=True).clamp_min(1e-12),
    )


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the next-token distribution in nats; [..., V] -> [...], float32, >= 0."""
    return Distribution(logits.float()).entropy()


def self_certainty(logits: Tensor) -> Tensor:
    """KL(uniform || p) over the tokens that are not at -inf, nats; [..., V] -> [...], float32, >= 0.

    Source: Kang, Zhao, Song 2025 (arXiv 2502.18581), equation of self-certainty; its mean over an answer ranks samples.
    """
    logprobs = logits.float().log_softmax(-1)
    allowed = logprobs > float("-inf")
    count = allowed.sum(-1)
    mean = torch.where(allowed, logprobs, torch.zeros_like(logprobs)).sum(-1) / count
    return (-mean - count.log()).clamp_min(0.0)


def in_parts(read: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    """What `read` says of the rows of some logits [n, V], on a CPU of as many rows at once as its caches hold."""
    size = rows_at_once(logits[0].shape[-1], logits[0].device)
    if len(logits[0]) <= size:
        return read(*logits)
    return torch.cat([read(*rows) for rows in zip(*(part.split(size) for part in logits), strict=True)])


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows of logits that several passes in turn had better read together: few on a CPU, whose caches are small."""
    return max(1, _LOGITS_AT_ONCE.get(device.type, 2**24) // vocab_size)


class Distribution:
    """Next-token probabilities of float32 logits [..., V]: whatever is read of them, one pass takes the exponentials."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.peak, self.best = logits.max(-1, keepdim=True)  # [..., 1]
        self._below = (logits - self.peak).clamp_min_(_FAR)  # finite, so that nothing times it is no number
        self._weights = self._below.exp()
        self._total = self._weights.sum(-1, keepdim=True)

    def logprobs(self, ids: Tensor) -> Tensor:
        """[..., K] -> [..., K]; -inf for what may not be written."""
        return self.logits.gather(-1, ids) - self.peak - self._total.log()

    def entropy(self) -> Tensor:
        """Nats, [...]."""
        return (
            self._total.log()[..., 0] - torch.linalg.vecdot(self._weights, self._below) / self._total[..., 0]
        ).clamp_min(0)

    def buckets(self, ids: Tensor) -> Tensor:
        """Probabilities of listed ids and of all others together; [..., S] -> [..., S + 1].

        The rest is summed from its own tokens: `1 - sum` in float32 would lose it below 1e-7, and its logarithm with it.
        """
        listed = self._weights.gather(-1, ids)
        rest = self._weights.scatter_(-1, ids, 0.0).sum(-1, keepdim=True)
        self._weights.scatter_(-1, ids, listed)
        return torch.cat([listed, rest], dim=-1) / (listed.sum(-1, keepdim=True) + rest)


def rank_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Place of a token in the order of the logits, 0 for the best; ties go to the lower id; [..., V], [...] -> [...].

    The order is that of `argmax` and of a stable descending sort, so rank < K says the token is a candidate.
    """
    value = logits.gather(-1, ids.unsqueeze(-1))  # [..., 1]
    before = torch.arange(logits.shape[-1], device=logits.device) < ids.unsqueeze(-1)
    return ((logits > value) | ((logits == value) & before)).sum(-1)


def rank_among(logits: Tensor, ids: Tensor, top_values: Tensor, top_ids: Tensor) -> Tensor:
    """`rank_of` with the largest logits in hand: only rows whose token is not surely one of them are looked through.

    [n, V], [n], [n, S], [n, S] -> [n].
    """
    value = logits.gather(-1, ids[:, None])  # [n, 1]
    rank = ((top_values > value) | ((top_values == value) & (top_ids < ids[:, None]))).sum(-1)
    if (outside := (value <= top_values[:, -1:])[:, 0]).any():  # equal ones may stand outside the list
        rank[outside] = rank_of(logits[outside], ids[outside])
    return rank
