"""Selectors: what a triggered step takes. S2T asks the LLM, S2T-LOCAL the SLM itself, under its adapter."""

from __future__ import annotations

from collections.abc import Sequence

from s2t.core.support import best_ids
from s2t.methods.base import Proposal, Round, Selection, Selector


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
