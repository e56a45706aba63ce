"""What a trigger and a selector may look at in one iteration of the loop, and the LLM that is read lazily.

The LLM keeps a list of unread tokens per row and catches up, in one forward, only when its distribution is
asked for; a divergence trigger asks at every token, an entropy or random trigger at triggered ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t.core.candidates import mask_forbidden
from s2t.core.support import align_vocabulary
from s2t.model.engine import Engine


class Reference:
    """The LLM beside the loop: row b of its engine follows row b of the SLM's."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pending: list[list[int]] = [[] for _ in range(engine.max_rows)]
        self._hidden: Tensor | None = None  # [max_rows, H]

    def start(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Begin a sequence in a slot; nothing is computed yet."""
        self.engine.reset(row)
        self.pending[row] = list(prompt_ids)

    def push(self, row: int, token_id: int) -> None:
        """Note a token the loop accepted."""
        self.pending[row].append(token_id)

    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` live in slot `target`."""
        self.engine.copy([source], [target])
        self.engine.work[target] = self.engine.work[source]
        self.pending[target] = self.pending[source]
        if self._hidden is not None:
            self._hidden[target] = self._hidden[source]

    def hidden(self, rows: Sequence[int]) -> Tensor:
        """Last hidden states of rows, after reading whatever they have not read; [n, H]."""
        late = [row for row in rows if self.pending[row]]
        if late:
            hidden = self.engine.extend(late, [self.pending[row] for row in late])
            if self._hidden is None:
                self._hidden = hidden.new_zeros(self.engine.max_rows, hidden.shape[-1])
            self._hidden[late] = hidden
            for row in late:
                self.pending[row] = []
        assert self._hidden is not None
        return self._hidden[list(rows)]


@dataclass(slots=True)
class State:
    """One iteration over the active rows 0..n-1; the LLM's logits are computed at first use and kept."""

    engine: Engine
    hidden: Tensor  # [n, H]
    logits: Tensor  # [n, V], masked
    uniforms: Tensor  # [n], for the random trigger
    reference: Reference | None = None
    _llm_logits: Tensor | None = None

    def llm_logits(self, rows: Sequence[int] | None = None) -> Tensor:
        """The LLM's masked next-token logits on the SLM's vocabulary; [n, V] (or [len(rows), V])."""
        assert self.reference is not None, "this strategy needs the LLM"
        if self._llm_logits is not None:
            return self._llm_logits if rows is None else self._llm_logits[list(rows)]
        wanted = range(len(self.hidden)) if rows is None else rows
        logits = self._masked(self.reference.engine.head(self.reference.hidden(list(wanted))))
        if rows is None:
            self._llm_logits = logits
        return logits

    def _masked(self, logits: Tensor) -> Tensor:
        size = self.engine.vocab_size
        logits = align_vocabulary(logits.to(self.logits.device), size)
        return mask_forbidden(logits, self.engine.forbidden_ids, size)


def log_softmax_at(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of listed ids; [n, V], [n, K] -> [n, K], float32."""
    return logits.gather(-1, ids) - torch.logsumexp(logits, dim=-1, keepdim=True)
