"""One triggered step on a server: the SLM's candidates, best first, and which of them wins.

Candidates come from one top-k reply, or one by one, each request forbidding those found before (a server that lists chosen
ids for some requests may garble the top-k of others in the same batch: vLLM's V1 sampler does). A candidate that could not
win even with the highest bin is neither looked for nor scored, so the winner is the same with fewer requests.

Under readout `rank` one request under the LoRA, on the prefix, brings the adapter's own first token. Where that is the greedy
one it wins; else candidates are looked for up to that token, behind which none could win.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from s2t.core.rule import winner
from s2t.decode.remote.selector import ServedSelector
from s2t.decode.remote.wire import Completion, CompletionRequest
from s2t.errors import RemoteError

Ask = Callable[[CompletionRequest], Awaitable[Completion]]
_SPARE = 4  # reserved ids that a top-k reply may hold before candidates are looked for one by one


@dataclass(slots=True)
class Chosen:
    """Candidates of one step with their log-probabilities and scores, best first, and the winner's place among them."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    """None of a candidate that was passed on the way to another, and could not win."""
    num_found: int = 0
    """Requests that looked for a candidate."""
    num_scored: int = 0
    """Requests that the adapter's reading took."""

    @property
    def index(self) -> int:
        return winner(self.scores)


@dataclass(frozen=True, slots=True)
class _Found:
    """One candidate, and its expected bin if it came along."""

    token: int
    logprob: float
    expected: float | None = None


@dataclass(slots=True)
class CandidateScorer:
    """Finds and scores the candidates of triggered steps; `plain` is what every request of this run carries.

    `is_exhaustive` finds and scores all K, for traces.
    """

    selector: ServedSelector
    num_candidates: int
    forbidden: frozenset[int]
    plain: CompletionRequest
    is_exhaustive: bool = False
    lists_top: bool = True
    """Whether top-k replies have been whole so far."""

    async def choose(self, ask: Ask, prefix: Sequence[int], greedy: int, logprob: float, key: str) -> Chosen:
        """The choice among the K likeliest tokens behind `prefix`, of which `greedy` is the first, at this log-probability."""
        if self.selector.config.adapter_weight == 0 and not self.is_exhaustive:
            return Chosen([greedy], [logprob], [self.selector.score(0.0, logprob)])
        if self.selector.ranks:
            return await self._rank(ask, prefix, greedy, logprob, key)
        listed = await self._top(ask, prefix, key) if self.lists_top and self.num_candidates > 1 else None
        if listed is None:
            return await self._one_by_one(ask, prefix, greedy, logprob, key)
        worth = [(i, value) for i, value in listed if self._can_win(value, self.selector.score(0.0, listed[0][1]))]
        expected = await asyncio.gather(*(self._expected(ask, prefix, i, key) for i, _ in worth))
        chosen = Chosen([i for i, _ in worth], [value for _, value in worth], num_found=1, num_scored=len(worth))
        chosen.scores = [self.selector.score(e, value) for e, (_, value) in zip(expected, worth, strict=True)]
        return chosen

    def _can_win(self, logprob: float, best: float, reading: float = 1.0) -> bool:
        """Whether a candidate of this log-probability could beat a score, with the highest reading there is."""
        return self.is_exhaustive or self.selector.score(reading, logprob) > best

    async def _top(self, ask: Ask, prefix: Sequence[int], key: str) -> list[tuple[int, float]] | None:
        """The K likeliest allowed tokens from one reply; None where it does not hold them."""
        wanted = self.num_candidates + _SPARE
        try:
            reply = await ask(replace(self.plain, prompt_ids=prefix, logprobs=wanted, key=key))
        except RemoteError as error:
            if error.status not in (400, 422):
                raise
            self.lists_top = False  # servers list 20 unless they are told otherwise
            return None
        listed = [(i, value) for i, value in reply.logprobs[0].items() if value > float("-inf")]
        if len(listed) < wanted:
            self.lists_top = False
            return None
        allowed = [item for item in listed if item[0] not in self.forbidden]
        allowed.sort(key=lambda item: -item[1])
        return allowed[: self.num_candidates] if len(allowed) >= self.num_candidates else None

    async def _one_by_one(self, ask: Ask, prefix: Sequence[int], greedy: int, logprob: float, key: str) -> Chosen:
        """Score a candidate while the next one is looked for, until no further one could win."""
        chosen, found, best = Chosen(), _Found(greedy, logprob), float("-inf")
        while True:
            chosen.ids.append(found.token)
            chosen.logprobs.append(found.logprob)
            following = None
            if len(chosen.ids) == self.num_candidates:
                expected = await self._known(ask, prefix, found, key)
            elif found.expected is not None and not self._can_win(found.logprob, best):
                expected = found.expected  # and no less likely one could
            else:
                expected, following = await asyncio.gather(
                    self._known(ask, prefix, found, key), self._next(ask, prefix, chosen.ids, key)
                )
                chosen.num_found += 1
            chosen.num_scored += 1
            chosen.scores.append(score := self.selector.score(expected, found.logprob))
            best = max(best, score)
            if following is None or not self._can_win(following.logprob, best):
                return chosen
            found = following

    async def _next(self, ask: Ask, prefix: Sequence[int], found: Sequence[int], key: str) -> _Found | None:
        """The likeliest token behind `prefix` that is not among those found; scored by the token after it, without a LoRA."""
        bias: Mapping[str, float] = self.plain.extra["logit_bias"] | {str(i): -100.0 for i in found}
        scores_too = self.selector.lora is None
        request = replace(
            self.plain,
            prompt_ids=prefix,
            max_tokens=2 if scores_too else 1,
            logprob_token_ids=self.selector.bins if scores_too else found[:1],
            extra={**self.plain.extra, "logit_bias": bias, "stop_token_ids": []},
            key=key,
        )
        reply = await ask(request)
        token = reply.token_ids[0]
        if token in self.forbidden or token in found:
            return None
        expected = self.selector.expected(reply.logprobs[1]) if scores_too else None
        return _Found(token, reply.logprobs[0][token], expected)

    async def _known(self, ask: Ask, prefix: Sequence[int], found: _Found, key: str) -> float:
        return found.expected if found.expected is not None else await self._expected(ask, prefix, found.token, key)

    async def _expected(self, ask: Ask, prefix: Sequence[int], candidate: int, key: str) -> float:
        """Expected bin behind one candidate."""
        request = replace(
            self.plain,
            prompt_ids=[*prefix, candidate],
            logprob_token_ids=self.selector.bins,
            model=self.selector.lora,
            key=key,
        )
        return self.selector.expected((await ask(request)).logprobs[0])

    # Readout rank

    async def _rank(self, ask: Ask, prefix: Sequence[int], greedy: int, logprob: float, key: str) -> Chosen:
        """No reading is above that of the adapter's own first token, and no candidate behind it has a higher log p_S either."""
        first, readings = await self._under_adapter(ask, prefix, [greedy], key)
        score, highest = self.selector.score, readings[first]
        chosen, to_beat = Chosen([greedy], [logprob], num_scored=1), score(readings[greedy], logprob)
        if first != greedy or self.is_exhaustive:
            await self._find_up_to(
                first, chosen, lambda value: self._can_win(value, to_beat, highest), ask, prefix, key
            )
        found = list(zip(chosen.ids, chosen.logprobs, strict=True))
        best = max(score(readings[i], value) for i, value in found if i in readings)
        if unread := [i for i, value in found if i not in readings and self._can_win(value, best, highest)]:
            readings |= (await self._under_adapter(ask, prefix, unread, key))[1]
            chosen.num_scored += 1
        chosen.scores = [score(readings[i], value) if i in readings else None for i, value in found]
        return chosen

    async def _find_up_to(
        self, last: int, chosen: Chosen, can_win: Callable[[float], bool], ask: Ask, prefix: Sequence[int], key: str
    ) -> None:
        """Add the candidates behind the greedy one as far as `last`, all K where it is none of them."""
        listed = await self._top(ask, prefix, key) if self.lists_top and self.num_candidates > 1 else None
        if listed is not None:
            ids = [i for i, _ in listed]
            end = ids.index(last) + 1 if last in ids and not self.is_exhaustive else len(ids)
            chosen.ids, chosen.logprobs, chosen.num_found = ids[:end], [value for _, value in listed[:end]], 1
            return
        while len(chosen.ids) < self.num_candidates and (self.is_exhaustive or chosen.ids[-1] != last):
            following = await self._next(ask, prefix, chosen.ids, key)
            chosen.num_found += 1
            if following is None or not can_win(following.logprob):
                return
            chosen.ids.append(following.token)
            chosen.logprobs.append(following.logprob)

    async def _under_adapter(
        self, ask: Ask, prefix: Sequence[int], ids: Sequence[int], key: str
    ) -> tuple[int, dict[int, float]]:
        """The adapter's first token behind a prefix, and its log-probabilities of that token and of some others."""
        reply = await ask(
            replace(self.plain, prompt_ids=prefix, logprob_token_ids=ids, model=self.selector.lora, key=key)
        )
        first = reply.token_ids[0]
        return first, {i: reply.logprobs[0][i] for i in (first, *ids)}
