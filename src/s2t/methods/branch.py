"""Local branch routing: each candidate goes on greedily for a few tokens before it is scored, and the best one is taken.

Source: Yin et al. 2026 (arXiv 2606.25354), who sample a tree and train a router over its states together with the model; here the
selector's own adapter reads the end of each branch, or their mean log-probability decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from s2t.config import DecodeConfig
from s2t.errors import ConfigError
from s2t.methods.base import Proposal, Round, Selection
from s2t.methods.select import S2TLocal
from s2t.model.adapter import SelectorReader


@dataclass
class LocalBranch(S2TLocal):
    """argmax of a score that is read `lookahead` tokens ahead: 0 is readout rank, 1 readout bins, as s2t-local has them.

    From 2 on the bins are read at the branch's last token; with readout rank, which reads no branch, the mean log-probability of
    its tokens is the score. A branch that has ended is read at its end.
    """

    lookahead: int | None = None

    @classmethod
    def of(cls, config: DecodeConfig) -> LocalBranch:
        return cls(config.lookahead)

    def check(self, adapter: SelectorReader | None) -> None:
        if adapter is None or self.lookahead is None or self.lookahead == _own(adapter):
            return
        if self.lookahead < 2:
            raise ConfigError(
                f"lookahead of an adapter with readout {adapter.config.readout} must be {_own(adapter)}, or 2 and more; got "
                f"{self.lookahead}."
            )
        if adapter.scope == "stream":
            raise ConfigError(
                f"lookahead {self.lookahead} needs an adapter of another scope than stream, which reads what is written alone."
            )

    def choose(self, round: Round, fired: Sequence[int], candidates: Proposal) -> Selection:
        adapter = round.adapter
        if self.lookahead is None or self.lookahead == _own(adapter):
            return super().choose(round, fired, candidates)
        ahead = round.ahead(fired, candidates.ids, self.lookahead, reads_end=not adapter.ranks)
        if ahead.states is None:
            scores = (candidates.logprobs + ahead.logprobs) / ahead.counts
        else:
            scores = adapter.scores(ahead.states, candidates.ids, candidates.logprobs)
        return Selection.best(candidates, scores.masked_fill(candidates.logprobs == float("-inf"), float("-inf")))


def _own(adapter: SelectorReader) -> int:
    """The tokens that the adapter's readout reads of each candidate."""
    return 0 if adapter.ranks else 1
