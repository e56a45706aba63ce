"""What a trigger and a selector may look at in one round of the loop; the LLM's part is read at first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t.model.engine import Engine


@dataclass(slots=True)
class State:
    """One round over n places, the steps whose tokens are to be chosen; the LLM's logits are computed at first use."""

    engine: Engine
    hidden: Tensor  # [n, H]
    logits: Tensor  # [n, V], masked
    uniforms: Tensor  # [n], for the random trigger
    read_llm: Callable[[Sequence[int]], Tensor] | None = None  # places -> masked logits, [len(places), V]
    num_listed: int | None = None  # likeliest tokens that the LLM's logits are true of; None: all
    look_up: Callable[[Sequence[int], Tensor, Tensor, bool], Tensor] | None = None
    _llm_logits: Tensor | None = None

    def llm_logits(self, places: Sequence[int] | None = None) -> Tensor:
        """The LLM's masked next-token logits on the SLM's vocabulary; [n, V] (or [len(places), V])."""
        assert self.read_llm is not None, "this strategy needs the LLM"
        if self._llm_logits is not None:
            return self._llm_logits if places is None else self._llm_logits[list(places)]
        logits = self.read_llm(range(len(self.hidden)) if places is None else places)
        if places is None:
            self._llm_logits = logits
        return logits

    def llm_logprobs(self, places: Sequence[int], ids: Tensor, must_order: bool = False) -> Tensor:
        """log p_L of listed ids at some places; [f, K] -> [f, K], float32, NaN where a remote LLM did not tell.

        `must_order` says that the best of each row has to be known.
        """
        logprobs = log_softmax_at(self.llm_logits(places), ids)
        return logprobs if self.look_up is None else self.look_up(places, ids, logprobs, must_order)


def log_softmax_at(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of listed ids; [n, V], [n, K] -> [n, K], float32."""
    return logits.gather(-1, ids) - torch.logsumexp(logits, dim=-1, keepdim=True)
