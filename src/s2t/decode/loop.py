"""The package's only decoding loop: B rows with lengths, triggers and ends of their own; yields a Step per token.

Each round proposes a token per row (a whole draft where an LLM reads along), reads the trigger, lets the selector
choose where it fired, retires finished rows, admits waiting ones, and runs one forward: accepted tokens, prompts of
new rows, and the candidates of triggered rows side by side. A draft takes a forward per token of it, and the LLM one for all
drafts. Token ids only, never text.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2t.core.sampling import uniforms
from s2t.core.support import best_ids, propose
from s2t.decode.adapter_stream import AdapterStream
from s2t.decode.batch import Batch, Row
from s2t.decode.reference import Reference
from s2t.decode.round import EngineRound, candidates_of, known
from s2t.decode.steps import StepTexts, earlier_layers
from s2t.errors import ConfigError
from s2t.methods.base import Proposal
from s2t.methods.strategies import Strategy
from s2t.model.checkpoint import not_finite
from s2t.model.engine import Engine
from s2t.records import Cost, Request, Step

_LOGITS_AT_ONCE = 2**27  # floats that the drafts of all rows may hold
_PRIOR_STEPS = 50  # a row starts as if one flip had been seen in this many steps

Adjust = Callable[[Sequence[int], Tensor], Tensor]
"""Request indices and the model's own logits of their next tokens, [n, V] -> the logits to go on with, [n, V]."""


class Decoder:
    """Runs requests through one strategy; `costs` holds what each finished request cost, by request index.

    `ends(request, token)` is asked after every accepted token, in order, whether the request's sequence is over.
    `adjust` may change the logits of every next token, before anything is read from them. All rows then step together, the
    requests at once: a row waits for the others' selections, and `adjust` sees all unfinished requests at one length.
    """

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        reference: Reference | None = None,
        max_new_tokens: int = 256,
        trace: bool = False,
        ends: Callable[[int, int], bool] | None = None,
        adjust: Adjust | None = None,
        texts: StepTexts | None = None,
    ) -> None:
        assert adjust is None or reference is None, "adjusted logits are not for the LLM beside the loop"
        _check(engine, strategy, reference)
        assert texts is not None or not strategy.has_spans, "spans end with steps of the text"
        selector = strategy.selector
        self.engine, self.strategy, self.reference = engine, strategy, reference
        self.max_new_tokens, self.trace, self.adjust = max_new_tokens, trace, adjust
        self.texts = texts
        engine.layers = earlier_layers(engine, selector.layers) if selector is not None and selector.layers else ()
        stream = AdapterStream(engine) if "adapter" in strategy.needs and engine.scope == "stream" else None
        self.batch = Batch(engine, reference, stream, max_new_tokens, ends, self._draws)
        self.costs: dict[int, Cost] = self.batch.costs
        self._draft_length = self._policy()

    def _policy(self) -> DraftLength:
        """How long drafts are; a selector that reads states has those of next tokens alone, so nothing is drafted behind them."""
        if self.reference is None:
            return DraftLength(fixed=1)
        if self.reference.max_draft is not None:
            return DraftLength(fixed=self.reference.max_draft)
        if self.strategy.selector is not None and self.strategy.selector.reads_states:
            return DraftLength(fixed=1)
        ratio = self.reference.cost_ratio(self.engine.loaded.num_params)
        room = _LOGITS_AT_ONCE // (self.engine.max_rows * self.engine.vocab_size)
        return DraftLength(self.strategy.draft_tokens, ratio, min(64, max(1, room)))

    def run(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Yield every request's steps, interleaved, each request's in order, until its stop id or the length limit."""
        batch, waiting = self.batch, deque(requests)
        longest = max((len(request.prompt_ids) for request in waiting), default=0) + self.max_new_tokens
        ahead = (self.strategy.selector.lookahead or 0) if self.strategy.selector is not None else 0
        batch.reserve(longest + self.strategy.num_candidates + ahead + 1)
        batch.waiting = waiting
        assert self.adjust is None or len(waiting) <= self.engine.max_rows
        while batch.waiting or batch.rows:
            yield from self._round().steps

    @torch.inference_mode()
    def stop(self, index: int) -> None:
        """End a running request after the steps it has yielded; for readers of `run`, between two steps."""
        for row in self.batch.rows:
            row.is_finished |= row.request.index == index
        self.batch.retire()

    @torch.inference_mode()
    def _round(self) -> EngineRound:
        """Propose, trigger, candidates, select, accept, and one forward for all rows."""
        strategy = self.strategy
        round = self._propose()
        fired = self._fired(round)
        if fired and strategy.selector is not None:
            logits = round.own_logits if len(fired) == len(round.rows) else round.own_logits[fired]
            candidates = Proposal(*propose(logits, strategy.num_candidates))
            selection = strategy.selector.choose(round, fired, candidates)
            round.note_choice(fired, candidates, selection, "llm" in strategy.needs)
        round.finish()
        return round

    # Proposing

    def _propose(self) -> EngineRound:
        """The next token of every ready row and, beside an LLM, a draft behind it; depth by depth.

        With `adjust` no row is ready before all are.
        """
        batch = self.batch
        active = [row for row in batch.rows if row.is_ready]
        if self.adjust is not None and (batch.waiting or len(active) < len(batch.rows)):
            active = []
        rows, offsets, hidden, logits, greedy, tokens = [], [], [], [], [], []
        tails: dict[Row, str] = {}
        depth, states = 0, torch.empty(0)
        if active:
            slots = [row.slot for row in active]
            assert batch.hidden is not None
            states = batch.hidden[: len(slots)] if slots == list(range(len(slots))) else batch.hidden[slots]
        while active:
            hidden.append(states)
            logits.append(self.engine.own_logits(states) if self.adjust is None else self._adjusted(active, states))
            rows += active
            offsets += [depth] * len(active)
            greedy += best_tokens(logits[-1], self.engine.loaded.name)
            tokens += self._tokens(active, logits[-1], greedy[-len(active) :], depth)
            depth += 1
            if self.reference is None:
                break
            going = self._going(active, tokens[-len(active) :], depth, tails)
            active = [row for row, _ in going]
            if active:
                states, _ = self.engine.step([row.slot for row in active], [[token] for _, token in going])
        if not rows:
            return EngineRound(batch, [], [], states, states, [], [], self.texts)
        at_once = len(hidden) == 1
        states, values = (parts[0] if at_once else torch.cat(parts) for parts in (hidden, logits))
        round = EngineRound(batch, rows, offsets, states, values, greedy, tokens, self.texts)
        if self.strategy.mixture:
            self._mix(round)
        return round

    def _adjusted(self, rows: Sequence[Row], states: Tensor) -> Tensor:
        """The logits of some rows' next tokens, as `adjust` has them."""
        assert self.adjust is not None
        adjusted = self.adjust([row.request.index for row in rows], self.engine.head(states))
        return self.engine.mask(adjusted.clone())  # whoever adjusts may keep what it returned

    def _going(
        self, rows: Sequence[Row], tokens: Sequence[int], depth: int, tails: dict[Row, str]
    ) -> list[tuple[Row, int]]:
        """The rows that draft on behind these tokens; `tails`, the text before each row's token, moves on with them."""
        going = [
            (row, token)
            for row, token in zip(rows, tokens, strict=True)
            if self._drafts_on(row, token, depth, tails.get(row, row.tail))
        ]
        if self.texts is not None:
            tails.update((row, self.texts.after(tails.get(row, row.tail), token)) for row, token in going)
        return going

    def _drafts_on(self, row: Row, token: int, depth: int, tail: str) -> bool:
        if token in self.engine.loaded.stop_ids or row.steps + depth >= row.limit:
            return False
        if self.texts is not None and self.strategy.trigger.drafts_steps:
            if self.texts.ends(tail, token):
                return False
            if not row.held:
                return depth < self.strategy.span_tokens
            if depth >= row.held:
                return False
        return depth < self._draft_length.at(row.steps, row.flips)

    def _tokens(self, rows: Sequence[Row], logits: Tensor, greedy: list[int], depth: int = 0) -> list[int]:
        """The rows' next tokens, at one depth of their drafts: the greedy ones, or samples."""
        how = self.strategy.sampling
        return greedy if how is None else how.draw(logits.float(), self.batch.draws(rows, [depth] * len(rows)))

    def _mix(self, round: EngineRound) -> None:
        """Draw the other samples of a mixture; the written token is the first of them."""
        how = self.strategy.sampling
        assert how is not None
        others = [how.draw(round.logits, round.uniforms(stream)) for stream in range(1, self.strategy.mixture)]
        for place, row in enumerate(round.rows):
            row.mixture = [round.tokens[place], *(drawn[place] for drawn in others)]

    def _draws(self, request: Request, stream: int = 0) -> np.ndarray:
        """The uniforms that a request's samples, or its random trigger, take; those of other streams for what else is drawn."""
        strategy = self.strategy
        if strategy.sampling is None and not strategy.trigger.is_random:
            return np.zeros(0)
        return uniforms(strategy.seed, stream_key(request, stream), self.max_new_tokens)

    # Triggering

    def _fired(self, round: EngineRound) -> list[int]:
        """The places where the trigger fires; what it read, and what a trace has beside it, is noted."""
        strategy = self.strategy
        values = strategy.trigger.read(round) if round.rows else None
        if values is not None:
            round.values = values.tolist()
            if any(map(math.isnan, round.values)):
                raise not_finite(self.batch.name_of("llm" in strategy.trigger.needs))
        if self.trace and round.rows:
            self._trace(round)
        if values is None:
            return []
        fires = strategy.trigger.fires(values, strategy.threshold)
        if self.strategy.has_spans:
            return round.hold(fires.tolist(), strategy)
        if not fires.any():
            return []
        return [place for place in fires.nonzero()[:, 0].tolist() if round.num_written[place] >= strategy.warmup_steps]

    def _trace(self, round: EngineRound) -> None:
        """Note the candidates of every place and, where the trigger reads the LLM, what it says of them."""
        proposal = Proposal(*propose(round.own_logits, self.strategy.num_candidates))
        details: list[dict] = [{"candidates": own} for own in candidates_of(proposal)]
        if "llm" in self.strategy.trigger.needs:
            top = best_ids(round.own_llm_logits()).tolist()
            probs = known(round.llm_logprobs(range(len(top)), proposal.ids).exp())
            for place, detail in enumerate(details):
                detail.update(llm_probs=probs[place], llm_top_id=top[place])
        for place, detail in enumerate(details):
            round.details.setdefault(place, {}).update(detail)


def stream_key(request: Request, stream: int) -> str:
    """The key of a request's uniforms; those of the streams (0, 1 …) are independent of each other."""
    key = request.key or str(request.index)
    return f"{key}/stream-{stream}" if stream else key


def _check(engine: Engine, strategy: Strategy, reference: Reference | None) -> None:
    """Raise ConfigError where the strategy cannot run on these engines."""
    if strategy.num_candidates > engine.vocab_size:
        raise ConfigError(
            f"num_candidates must be 1..{engine.vocab_size} (the vocabulary size), got {strategy.num_candidates}; "
            "lower --num-candidates."
        )
    selector = strategy.selector
    is_inside = strategy.mixture or strategy.trigger.reads_inside or (selector is not None and selector.layers)
    if is_inside and not engine.reads_inside:
        raise ConfigError(
            f"strategy {strategy.name} reads layers or embeddings of the model, which llama.cpp keeps; pass --engine torch."
        )
    if "llm" in strategy.needs and reference is None:
        raise ConfigError(f"strategy {strategy.name} reads the LLM at inference; pass --llm.")
    if reference is not None and reference.max_draft is not None and strategy.draft_tokens > reference.max_draft:
        raise ConfigError(
            f"a pair with different tokenizers is read step by step; leave --draft-tokens at 0, got {strategy.draft_tokens}."
        )
    if reference is not None and strategy.trigger.drafts_steps and reference.max_draft is not None:
        raise ConfigError(
            f"strategy {strategy.name} judges whole steps, and a pair with different tokenizers is read token by token; "
            "use a pair that shares its tokenizer."
        )
    listed = reference.num_listed if reference is not None else None
    lacking = strategy.selector.lacks(listed) if strategy.selector is not None and listed is not None else None
    if lacking is not None:
        raise ConfigError(lacking)
    if strategy.selector is not None:
        strategy.selector.check(engine.adapter)
    if "adapter" in strategy.needs and engine.adapter is None:
        raise ConfigError(f"strategy {strategy.name} needs --adapter, a folder written by `s2t train`.")


@dataclass(frozen=True, slots=True)
class DraftLength:
    """`fixed` tokens, or as many as cost least at the row's own rate of flips; never more than `ceiling`.

    A draft of g tokens costs g SLM forwards and one LLM forward (c SLM forwards) and yields about g - f g^2 / 2 tokens
    at a flip rate f, since only a flip ends it early; the cost per token is least at g = sqrt(c^2 + 2 c / f) - c. The
    output does not depend on g, and g depends on nothing but the row's own steps.
    """

    fixed: int = 0
    cost_ratio: float = 1.0
    ceiling: int = 64

    def at(self, steps: int, flips: int) -> int:
        """Tokens to draft for a row that has written `steps` tokens with `flips` flips among them."""
        if self.fixed:
            return self.fixed
        rate, ratio = (flips + 1) / (steps + _PRIOR_STEPS), self.cost_ratio
        return max(1, min(self.ceiling, round(math.sqrt(ratio**2 + 2 * ratio / rate) - ratio)))


def best_tokens(logits: Tensor, name: str) -> list[int]:
    """The likeliest token of each row; [n, V] -> n. Raises ModelError where a row holds NaN or infinity, or nothing but -inf."""
    best = best_ids(logits)[:, None]  # of a NaN, where there is one
    tokens = torch.where(logits.gather(-1, best).isfinite(), best, -1)[:, 0].tolist()
    if min(tokens, default=0) < 0:
        raise not_finite(name)
    return tokens
