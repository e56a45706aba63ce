"""What a trigger and a selector may look at in one iteration of the loop, and the LLM that is read lazily.

The LLM keeps a list of unread tokens per row and catches up, in one forward, only when its distribution is
asked for; that forward reads the row's whole draft as well, so one forward judges many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2t.core.candidates import mask_forbidden
from s2t.core.support import align_vocabulary
from s2t.model.engine import Engine, Work


class Reference:
    """The LLM beside the loop: row b of its engine follows row b of the SLM's, at most one forward a round.

    For pairs of one tokenizer; `decode.text_reference` does the same for others.
    """

    max_draft: int | None = None
    num_listed: int | None = None

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pending: list[list[int]] = [[] for _ in range(engine.max_rows)]
        self._states: dict[int, Tensor] = {}  # row -> [d, H], of the rows read in this round

    @property
    def work(self) -> list[Work]:
        """What each row cost so far."""
        return self.engine.work

    def cost_ratio(self, slm_params: int) -> float:
        """What one forward costs, in forwards of the SLM."""
        return self.engine.loaded.num_params / slm_params

    def start(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Begin a sequence in a slot; nothing is computed yet."""
        self.engine.reset(row)
        self.pending[row] = list(prompt_ids)

    def logits(
        self,
        wanted: Sequence[tuple[int, int]],
        drafts: Mapping[int, Sequence[int]],
        slm_logits: Tensor,
        forbidden_ids: Tensor,
    ) -> Tensor:
        """The LLM's masked logits at some (row, offset) of the drafts, on the SLM's vocabulary; slm_logits [n, V] -> [n, V]."""
        states = self.states(drafts)
        hidden = torch.stack([states[row][offset] for row, offset in wanted])  # [n, H']
        size = slm_logits.shape[-1]
        logits = align_vocabulary(self.engine.head(hidden).to(slm_logits.device), size)
        return mask_forbidden(logits, forbidden_ids, size)

    def states(self, drafts: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """The states that each row's d drafted tokens are predicted from, row -> [d, H]; one forward for all unread rows."""
        late = [row for row in drafts if row not in self._states]
        if late:
            hidden = self.engine.read(late, [[*self.pending[row], *drafts[row][:-1]] for row in late])
            self._states |= {row: states[-len(drafts[row]) :] for row, states in zip(late, hidden, strict=True)}
        return {row: self._states[row] for row in drafts}

    def settle(self, row: int, draft: Sequence[int], accepted: Sequence[int]) -> None:
        """End a row's round: keep what was read of the accepted tokens, which agree with the draft up to the last one."""
        if self._states.pop(row, None) is None:
            self.pending[row].extend(accepted)
            return
        self.engine.crop([row], [self.engine.lengths[row] - (len(draft) - len(accepted))])
        self.pending[row] = [accepted[-1]]

    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` live in slot `target`."""
        self.engine.copy([source], [target])
        self.engine.work[target] = self.engine.work[source]
        self.pending[target] = self.pending[source]


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
