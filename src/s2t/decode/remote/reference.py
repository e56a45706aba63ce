"""The remote LLM beside the decoding loop: one request per row and draft, all rows of a round in flight together.

It knows its likeliest tokens alone; the others share the rest equally, which leaves divergence on `llm-top` and every
choice among listed tokens exact. Candidates that are not listed are asked for by id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from s2t.decode.reference import Reference
from s2t.decode.remote.llm import Listed, RemoteLLM
from s2t.decode.remote.wire import CompletionRequest
from s2t.model.loaded import Work

_ROUND_TRIP = 16.0  # forwards of the SLM that a request is worth at least
_DRAFT_BY_TOKEN = 8  # tokens drafted where each costs a request of its own


class RemoteReference(Reference):
    """Rows of prefixes that servers are asked about; no server keeps a row, so moving one copies its ids."""

    def __init__(self, llm: RemoteLLM, num_rows: int) -> None:
        self.llm = llm
        self.num_listed = llm.num_listed
        self.work = [Work() for _ in range(num_rows)]
        self.prefixes: list[list[int]] = [[] for _ in range(num_rows)]
        self._read: dict[tuple[int, int], Listed] = {}  # (row, offset) -> one position, in this round

    def cost_ratio(self, slm_params: int) -> float:
        """What one request costs, in forwards of the SLM; the draft's length follows from it."""
        if not self.llm.abilities.prompt_logprobs:
            return 1.0
        return max(_ROUND_TRIP, (self.llm.outline.num_params or 0) / slm_params)

    def start(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Begin a sequence in a slot; nothing is asked yet."""
        self.work[row] = Work()
        self.prefixes[row] = list(prompt_ids)

    def settle(self, row: int, draft: Sequence[int], accepted: Sequence[int]) -> None:
        """The row went on with these tokens; what was told of its draft is forgotten."""
        self.prefixes[row].extend(accepted)
        for offset in range(len(draft)):
            self._read.pop((row, offset), None)

    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` live in slot `target`, with what was told of it in this round."""
        self.work[target], self.prefixes[target] = self.work[source], self.prefixes[source]
        for row, offset in [place for place in self._read if place[0] == source]:
            self._read[target, offset] = self._read.pop((row, offset))

    def logits(
        self,
        wanted: Sequence[tuple[int, int]],
        drafts: Mapping[int, Sequence[int]],
        slm_logits: Tensor,
        forbidden_ids: Tensor,
    ) -> Tensor:
        """Masked logits at some (row, offset) of the drafts, on the SLM's vocabulary; slm_logits [n, V] -> [n, V]."""
        self._ask(wanted, drafts)
        places = [self._read[place] for place in wanted]
        both = Listed(*(np.concatenate([getattr(one, name) for one in places]) for name in ("ids", "logprobs")))
        return both.logits(slm_logits.shape[-1], forbidden_ids)

    def ask(self, drafts: Mapping[int, Sequence[int]], suffix_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
        """One request per row: of the answers by their ids, or (-inf for those that are not listed) of the likeliest tokens."""
        prefixes = [[*self.prefixes[row], *draft, *suffix_ids] for row, draft in drafts.items()]
        asked = [CompletionRequest(prefix, logprobs=self.llm.num_listed) for prefix in prefixes]
        for row, request in zip(drafts, asked, strict=True):
            self._count(row, [request])
        if self.llm.abilities.logprob_token_ids:
            return torch.from_numpy(self.llm.logprobs_of(prefixes, [answer_ids] * len(prefixes)))
        listed = Listed.joined(self.llm.answers(asked))
        is_answer = listed.ids[:, None, :] == np.asarray(answer_ids)[:, None]  # [r, A, S]
        return torch.from_numpy(np.where(is_answer, listed.logprobs[:, None, :], -np.inf).max(-1))

    def look_up(
        self,
        wanted: Sequence[tuple[int, int]],
        drafts: Mapping[int, Sequence[int]],
        ids: Tensor,
        logprobs: Tensor,
        must_order: bool,
    ) -> Tensor:
        """log p_L of candidates: listed ones as they are, NaN for others, unless the best must be known; [n, K] -> [n, K].

        A candidate that is listed goes before all that are not, so only places with none listed are asked for by id.
        """
        self._ask(wanted, drafts)
        listed = torch.stack(
            [
                torch.isin(row, torch.from_numpy(self._read[place].ids[0]).to(row))
                for row, place in zip(ids, wanted, strict=True)
            ]
        )
        found = logprobs.masked_fill(~listed, float("nan"))
        if not must_order or bool(listed.any(-1).all()):
            return found
        unknown = [i for i in range(len(wanted)) if not listed[i].any()]
        if not self.llm.abilities.logprob_token_ids:
            self.llm.num_unknown += len(unknown)
            return found
        prefixes = [self._prefix(wanted[i], drafts) for i in unknown]
        exact = self.llm.logprobs_of(prefixes, [ids[i].tolist() for i in unknown])
        for i, prefix in zip(unknown, prefixes, strict=True):
            self._count(wanted[i][0], [CompletionRequest(prefix)])
        found[unknown] = torch.from_numpy(exact).to(found)
        return found

    def _prefix(self, place: tuple[int, int], drafts: Mapping[int, Sequence[int]]) -> list[int]:
        row, offset = place
        return [*self.prefixes[row], *drafts[row][:offset]]

    def _ask(self, wanted: Sequence[tuple[int, int]], drafts: Mapping[int, Sequence[int]]) -> None:
        """Read what is not known yet of this round's places."""
        offsets: dict[int, list[int]] = {}
        for row, offset in wanted:
            if (row, offset) not in self._read:
                offsets.setdefault(row, []).append(offset)
        if not offsets:
            return
        asked = {row: self.llm.requests(self.prefixes[row], drafts[row], own) for row, own in offsets.items()}
        for row, requests in asked.items():
            self._count(row, requests)
        found = iter(self.llm.answers([request for requests in asked.values() for request in requests]))
        for row, requests in asked.items():
            for request in requests:
                listed = next(found)
                is_prompt = request.prompt_logprobs is not None
                first = (request.num_prompt_skipped if is_prompt else len(request.prompt_ids)) - len(self.prefixes[row])
                for at in range(len(listed.ids)):
                    self._read[row, first + at] = Listed(listed.ids[at : at + 1], listed.logprobs[at : at + 1])

    def _count(self, row: int, requests: Sequence[CompletionRequest]) -> None:
        """A request counts as one forward over its whole prompt, an upper bound where the server has the prefix cached."""
        work, flops = self.work[row], self.llm.outline.flops
        for request in requests:
            width = len(request.prompt_ids)
            work.forwards += 1
            work.processed += width
            work.flops += flops(width, width / 2) if flops is not None else 0.0
