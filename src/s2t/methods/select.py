"""Select to Think: where to choose (divergence, criticality), and what is taken there: S2T asks the LLM, S2T-LOCAL the SLM
itself, under its adapter. Other triggers stand in `methods.triggers` and files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from s2t.config import DecodeConfig
from s2t.core.support import best_ids, divergence, in_parts, resolve_support
from s2t.methods.base import Proposal, Round, Selection, Selector, Trigger


class S2T(Selector):
    """argmax of p_L over the SLM's candidates. Source: arXiv 2604.26940."""

    def choose(self, round: Round, fired: Sequence[int], candidates: Proposal) -> Selection:
        logprobs = round.llm_logprobs(fired, candidates.ids, must_order=True)  # [f, K]
        return Selection.best(candidates, logprobs, logprobs.exp())


class Takeover(Selector):
    """argmax of p_L over the whole vocabulary."""

    def choose(self, round: Round, fired: Sequence[int], candidates: Proposal) -> Selection:
        token_ids = best_ids(round.own_llm_logits(fired))  # [f]
        return Selection.of_tokens(candidates, token_ids, round.llm_logprobs(fired, candidates.ids).exp())


class S2TLocal(Selector):
    """argmax of the adapter's score (`SelectorReader.scores`) over the SLM's candidates, with no LLM.

    Readout `rank` reads the last token of the prefix once more under the adapter, `bins` every candidate.
    """

    reads_states = True

    def choose(self, round: Round, fired: Sequence[int], candidates: Proposal) -> Selection:
        adapter = round.adapter
        states = round.states(fired, None if adapter.ranks else candidates.ids)  # [f, 1 or K, H]
        scores = adapter.scores(states, candidates.ids, candidates.logprobs)  # [f, K]
        return Selection.best(candidates, scores.masked_fill(candidates.logprobs == float("-inf"), float("-inf")))


@dataclass
class Divergence(Trigger):
    """Disagreement of LLM and SLM, nats; reads the LLM at every token. Source: arXiv 2604.26940."""

    support_size: int = 64
    kind: str = "llm-slm"
    support: str = "auto"
    name = "divergence"
    needs = ("llm",)

    @classmethod
    def of(cls, config: DecodeConfig) -> Divergence:
        return cls(config.support_size, config.divergence, config.support)

    def read(self, round: Round) -> Tensor:
        support, size = resolve_support(self.support, self.support_size, self.kind, round.num_listed)
        between = partial(divergence, support_size=size, kind=self.kind, support=support)
        return in_parts(between, round.own_llm_logits(), round.own_logits)


class Criticality(Trigger):
    """The SLM's own estimate, in [0, 1], that the step is a divergence point; no LLM."""

    name = "criticality"
    needs = ("adapter",)

    def read(self, round: Round) -> Tensor:
        return round.adapter.criticality(round.hidden)
