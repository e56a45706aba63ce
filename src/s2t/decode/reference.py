"""The LLM beside the loop, and the usual one: a model of the SLM's tokenizer in this process.

`decode.text_reference` reads an LLM with another tokenizer, `decode.remote.reference` one on servers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from s2t.core.support import align_vocabulary
from s2t.model.engine import Engine
from s2t.model.loaded import Work


class Reference(ABC):
    """Rows that follow the SLM's rows and are asked for next-token distributions; a round drafts, asks, and settles.

    A place is a (row, offset into the row's draft); drafts are the tokens that the SLM proposes behind what is settled.
    """

    max_draft: int | None = None
    """Longest draft that can be judged at once; None for no limit."""
    num_listed: int | None = None
    """Likeliest tokens that its distribution is true of; None for all."""
    is_slm: bool = False
    """Whether it is the SLM itself, reading the prompt without its context; its work is then the SLM's."""

    name: str = "the LLM"
    """What it is called."""
    work: list[Work]
    """What each row cost so far."""

    @abstractmethod
    def cost_ratio(self, slm_params: int) -> float:
        """What one forward, or request, costs, in forwards of the SLM; the draft's length follows from it."""

    @abstractmethod
    def start(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Begin a sequence in a slot, with the LLM's own prompt; nothing is computed yet."""

    def read(self, drafts: Mapping[int, Sequence[int]]) -> None:  # noqa: B027
        """Read these drafts of some rows, where that is done at once for all of them; before `logits` and `ask`."""

    @abstractmethod
    def logits(
        self,
        wanted: Sequence[tuple[int, int]],
        drafts: Mapping[int, Sequence[int]],
        slm_logits: Tensor,
        forbidden_ids: Tensor,
    ) -> Tensor:
        """Masked next-token logits at some places, on the SLM's vocabulary, of any dtype; slm_logits [n, V] -> [n, V]."""

    def look_up(
        self,
        wanted: Sequence[tuple[int, int]],
        drafts: Mapping[int, Sequence[int]],
        ids: Tensor,
        logprobs: Tensor,
        must_order: bool,
    ) -> Tensor:
        """log p_L of candidates at some places, as `logits` gave them, mended where these are not exact; [n, K] -> [n, K].

        NaN where it is not known; `must_order` says that the best of each row has to be known.
        """
        return logprobs

    @abstractmethod
    def ask(self, drafts: Mapping[int, Sequence[int]], suffix_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
        """Logits of some tokens behind each row's whole draft and a suffix, both of which are forgotten; [r, A]."""

    @abstractmethod
    def settle(self, row: int, draft: Sequence[int], accepted: Sequence[int]) -> None:
        """End a row's round: it goes on with the accepted tokens, which agree with the draft up to the last one."""

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` live in slot `target`."""

    def leave(self, row: int) -> None:  # noqa: B027
        """Nothing lives in this slot any more."""


class EngineReference(Reference):
    """An LLM in this process: row b of its engine follows row b of the SLM's."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.name, self.work = engine, engine.loaded.name, engine.work

    def cost_ratio(self, slm_params: int) -> float:
        return self.engine.loaded.num_params / slm_params

    def start(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.engine.reset(row)

    def move(self, source: int, target: int) -> None:
        self.engine.copy([source], [target])
        self.engine.work[target] = self.engine.work[source]

    def leave(self, row: int) -> None:
        self.engine.reset(row)


class ModelReference(EngineReference):
    """An LLM of the SLM's tokenizer: a forward a round at most.

    It keeps a list of unread tokens per row and catches up, in one forward, only when its distribution is asked for; that
    forward reads the row's whole draft as well, so one forward judges many tokens.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.pending: list[list[int]] = [[] for _ in range(engine.max_rows)]
        self._states: dict[int, Tensor] = {}  # row -> [d, H], of the rows read in this round

    def start(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Begin a sequence in a slot; nothing is computed yet."""
        self.engine.reset(row)
        self.pending[row] = list(prompt_ids)

    def read(self, drafts: Mapping[int, Sequence[int]]) -> None:
        """The states that each row's d drafted tokens are predicted from, [d, H]: one forward for all unread rows."""
        if late := [row for row in drafts if row not in self._states]:
            unread = [[*self.pending[row], *drafts[row][:-1]] for row in late]
            states = self.engine.read(late, unread, [len(drafts[row]) for row in late])
            self._states.update(zip(late, states, strict=True))

    def logits(
        self,
        wanted: Sequence[tuple[int, int]],
        drafts: Mapping[int, Sequence[int]],
        slm_logits: Tensor,
        forbidden_ids: Tensor,
    ) -> Tensor:
        """The LLM's masked logits at some (row, offset) of the drafts, on the SLM's vocabulary; slm_logits [n, V] -> [n, V]."""
        hidden = torch.stack([self._states[row][offset] for row, offset in wanted])  # [n, H']
        size = slm_logits.shape[-1]
        logits = align_vocabulary(self.engine.head.own(hidden).to(slm_logits.device), size)
        return logits.index_fill_(-1, forbidden_ids, float("-inf"))  # fresh: masked in place

    @torch.inference_mode()
    def ask(self, drafts: Mapping[int, Sequence[int]], suffix_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
        """One more forward, over the last drafted token and the suffix."""
        rows = list(drafts)
        lengths = [self.engine.lengths[row] for row in rows]
        hidden = self.engine.extend(rows, [[drafts[row][-1], *suffix_ids] for row in rows])  # [r, H']
        self.engine.crop(rows, lengths)
        return self.engine.head(hidden)[:, list(answer_ids)]

    def settle(self, row: int, draft: Sequence[int], accepted: Sequence[int]) -> None:
        """End a row's round: keep what was read of the accepted tokens, which agree with the draft up to the last one."""
        if self._states.pop(row, None) is None:
            self.pending[row].extend(accepted)
            return
        self.engine.crop([row], [self.engine.lengths[row] - (len(draft) - len(accepted))])
        self.pending[row] = [accepted[-1]]

    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` live in slot `target`, with what was read of it in this round."""
        super().move(source, target)
        self.pending[target] = self.pending[source]
        if source in self._states:  # of a row that waits for a selection
            self._states[target] = self._states.pop(source)


class BareReference(ModelReference):
    """The SLM itself beside the SLM: it reads the answer behind the prompt without its context."""

    is_slm = True
