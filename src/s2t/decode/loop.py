"""The package's only decoding loop: B rows with lengths, triggers and ends of their own; yields a Step per token.

Each round proposes a token per row (a whole draft where an LLM reads along), reads the trigger, lets the selector
choose where it fired, retires finished rows, admits waiting ones, and runs one forward: accepted tokens, prompts of
new rows, and the candidates of triggered rows side by side. Token ids only, never text.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from s2t.core.candidates import propose
from s2t.core.sampling import filter_logits, sample, uniforms
from s2t.decode.adapter_stream import AdapterStream
from s2t.decode.draft import DraftLength
from s2t.decode.finite import best_tokens, numbers
from s2t.decode.reference import Reference
from s2t.decode.rows import Choice, Places, Request, Row
from s2t.decode.selectors import LocalSelector, Selection
from s2t.decode.state import State
from s2t.decode.strategies import Sampling, Strategy
from s2t.errors import ConfigError
from s2t.model.checkpoint import not_finite
from s2t.model.engine import Engine, Work
from s2t.records import Candidates, Cost, Step

_PROMPT_TOKENS_AT_ONCE = 2**14
_LOGITS_AT_ONCE = 2**27  # floats that the drafts of all rows may hold


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
    ) -> None:
        assert adjust is None or reference is None, "adjusted logits are not for the LLM beside the loop"
        if strategy.num_candidates > engine.vocab_size:
            raise ConfigError(
                f"num_candidates must be 1..{engine.vocab_size} (the vocabulary size), got {strategy.num_candidates}; "
                "lower --num-candidates."
            )
        if strategy.needs_llm and reference is None:
            raise ConfigError(f"strategy {strategy.name} reads the LLM at inference; pass --llm.")
        if reference is not None and reference.max_draft is not None and strategy.draft_tokens > reference.max_draft:
            raise ConfigError(
                f"a pair with different tokenizers is read step by step; leave --draft-tokens at 0, got {strategy.draft_tokens}."
            )
        if (strategy.selector is not None and strategy.selector.needs_adapter) and engine.adapter is None:
            raise ConfigError(f"strategy {strategy.name} needs --adapter, a folder written by `s2t train`.")
        self.engine, self.strategy, self.reference = engine, strategy, reference
        self.max_new_tokens, self.trace, self.ends, self.adjust = max_new_tokens, trace, ends, adjust
        self.costs: dict[int, Cost] = {}
        self.rows: list[Row] = []
        self.hidden: Tensor | None = None  # [max_rows, H]
        self._scores_itself = isinstance(strategy.selector, LocalSelector)
        self.stream = AdapterStream(engine) if self._scores_itself and engine.scope == "stream" else None
        self._draft_length = self._policy()

    def _policy(self) -> DraftLength:
        if self.reference is None:
            return DraftLength(fixed=1)
        if self.reference.max_draft is not None:
            return DraftLength(fixed=self.reference.max_draft)
        ratio = self.reference.cost_ratio(self.engine.loaded.num_params)
        room = _LOGITS_AT_ONCE // (self.engine.max_rows * self.engine.vocab_size)
        return DraftLength(self.strategy.draft_tokens, ratio, min(64, max(1, room)))

    def run(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Yield every request's steps, interleaved, each request's in order, until its stop id or the length limit."""
        waiting = deque(requests)
        self._reserve(max((len(request.prompt_ids) for request in waiting), default=0) + self.max_new_tokens)
        assert self.adjust is None or len(waiting) <= self.engine.max_rows
        while waiting or self.rows:
            yield from self._round(waiting)

    def _reserve(self, length: int) -> None:
        """Make room for rows of so many tokens, and candidates behind them."""
        for engine in (self.engine, *([self.stream.engine] if self.stream is not None else [])):
            engine.reserve(length + self.strategy.num_candidates + 1)

    @torch.inference_mode()
    def stop(self, index: int) -> None:
        """End a running request after the steps it has yielded; for readers of `run`, between two steps."""
        for row in self.rows:
            row.is_finished |= row.request.index == index
        self._retire()

    @torch.inference_mode()
    def _round(self, waiting: deque[Request]) -> list[Step]:
        steps: list[Step] = []
        undecided: list[tuple[Row, int]] = []
        places = choice = None
        ready = [row for row in self.rows if row.is_ready]
        if self.adjust is not None and (waiting or len(ready) < len(self.rows)):
            ready = []
        if ready:
            places = self._propose(ready)
            choice = self._choose(places)
            for row in ready:
                place = places.of_row[row][0]
                if self._scores_itself and place in choice.fired:
                    undecided.append((row, place))
                    row.is_ready, row.feed = False, [places.greedy[place]]  # the likeliest winner
                else:
                    self._accept(row, places, choice, steps)
        self._retire()
        self._admit(waiting)
        if places is not None and choice is not None and undecided:
            self._forward_and_select(places, choice, undecided, steps)
        else:
            self._forward()
        self._retire()
        return steps

    # Proposing

    def _propose(self, ready: Sequence[Row]) -> Places:
        """The next token of every ready row and, beside an LLM, a draft behind it; depth by depth."""
        rows, offsets, hidden, logits, greedy, tokens = [], [], [], [], [], []
        active = list(ready)
        states = self._states_of(active)
        for depth in range(self.max_new_tokens):
            hidden.append(states)
            logits.append(self._logits(active, states))
            rows += active
            offsets += [depth] * len(active)
            greedy += best_tokens(logits[-1], self.engine.loaded.name)
            tokens += self._tokens(active, logits[-1], greedy[-len(active) :])
            if self.reference is None:
                break
            last = tokens[-len(active) :]
            going = [
                (row, token) for row, token in zip(active, last, strict=True) if self._drafts_on(row, token, depth + 1)
            ]
            if not going:
                break
            active = [row for row, _ in going]
            states = self.engine.extend([row.slot for row in active], [[token] for _, token in going])
        places = Places(rows, offsets, _join(hidden), _join(logits), greedy, tokens)
        for place, row in enumerate(rows):
            places.of_row.setdefault(row, []).append(place)
        return places

    def _logits(self, rows: Sequence[Row], states: Tensor) -> Tensor:
        if self.adjust is None:
            return self.engine.logits(states)
        adjusted = self.adjust([row.request.index for row in rows], self.engine.head(states))
        return self.engine.mask(adjusted.clone())  # whoever adjusts may keep what it returned

    def _states_of(self, rows: Sequence[Row]) -> Tensor:
        assert self.hidden is not None
        slots = [row.slot for row in rows]
        return self.hidden[: len(slots)] if slots == list(range(len(slots))) else self.hidden[slots]

    def _drafts_on(self, row: Row, token: int, depth: int) -> bool:
        if token in self.engine.loaded.stop_ids or row.steps + depth >= row.limit:
            return False
        return depth < self._draft_length.at(row.steps, row.flips)

    def _tokens(self, rows: Sequence[Row], logits: Tensor, greedy: list[int]) -> list[int]:
        """The rows' next tokens: the greedy ones, or samples."""
        how = self.strategy.sampling
        return greedy if how is None else self._sample(how, rows, logits)

    def _sample(self, how: Sampling, rows: Sequence[Row], logits: Tensor) -> list[int]:
        filtered = filter_logits(logits, how.temperature, how.top_k, how.top_p, how.min_p)
        return sample(filtered, self._uniforms(rows, [0] * len(rows))).tolist()

    def _uniforms(self, rows: Sequence[Row], offsets: Sequence[int]) -> Tensor:
        draws = [
            row.draws[row.steps + at] if row.steps + at < len(row.draws) else 0.0
            for row, at in zip(rows, offsets, strict=True)
        ]
        return torch.tensor(draws, dtype=torch.float64, device=self.engine.device)

    # Choosing

    def _choose(self, places: Places) -> Choice:
        """Read the trigger everywhere and, where it fired, propose candidates; an LLM selects at once."""
        strategy, reference = self.strategy, self.reference
        state = State(
            self.engine,
            places.hidden,
            places.logits,
            self._uniforms(places.rows, places.offsets),
            None if reference is None else lambda wanted: self._llm_logits(places, wanted),
            None if reference is None else reference.num_listed,
            None if reference is None else lambda *asked: self._look_up(reference, places, *asked),
        )
        values = strategy.trigger.read(state)
        read = None if values is None else numbers(values.tolist(), self._read_from(strategy.trigger.needs_llm))
        choice = Choice(read, self._fired(places, values))
        if self.trace:
            choice.details = self._trace_details(state)
        if choice.fired:
            fired_logits = places.logits if len(choice.fired) == len(places.rows) else places.logits[choice.fired]
            choice.candidate_ids, choice.logprobs = propose(fired_logits, strategy.num_candidates)
            if strategy.selector is not None and not self._scores_itself:
                self._note(choice, strategy.selector.select(state, choice.fired, choice.candidate_ids, choice.logprobs))
        return choice

    @property
    def _llm_tells_all(self) -> bool:
        """Whether the LLM's probabilities are known of every token: not where servers list some."""
        return self.reference is not None and self.reference.num_listed is None

    def _read_from(self, is_llm: bool) -> str:
        """The name of the model that a number was read from."""
        if is_llm and self.reference is not None:
            return self.reference.name
        return self.engine.loaded.name + ("" if self.engine.adapter is None else " under its adapter")

    def _llm_logits(self, places: Places, wanted: Sequence[int]) -> Tensor:
        """The LLM's logits at some places, after one forward over what it has not read of those rows; [n, V]."""
        assert self.reference is not None
        rows = dict.fromkeys(places.rows[place] for place in wanted)
        return self.reference.logits(
            [(places.rows[place].slot, places.offsets[place]) for place in wanted],
            {row.slot: places.draft(row) for row in rows},
            places.logits if len(wanted) == len(places.rows) else places.logits[list(wanted)],
            self.engine.forbidden_ids,
        )

    def _look_up(
        self,
        reference: Reference,
        places: Places,
        asked: Sequence[int],
        ids: Tensor,
        logprobs: Tensor,
        must_order: bool,
    ) -> Tensor:
        """log p_L of candidates, exact where the LLM can tell; [f, K]."""
        wanted = [(places.rows[place].slot, places.offsets[place]) for place in asked]
        drafts = {places.rows[place].slot: places.draft(places.rows[place]) for place in asked}
        return reference.look_up(wanted, drafts, ids, logprobs, must_order)

    def _fired(self, places: Places, values: Tensor | None) -> list[int]:
        if values is None:
            return []
        fires = self.strategy.trigger.fires(values, self.strategy.threshold)
        if not fires.any():
            return []
        warmup = self.strategy.warmup_steps
        rows, offsets = places.rows, places.offsets
        return [i for i in fires.nonzero()[:, 0].tolist() if rows[i].steps + offsets[i] >= warmup]

    def _trace_details(self, state: State) -> dict[int, dict]:
        ids, logprobs = propose(state.logits, self.strategy.num_candidates)
        details = _candidate_details(ids, logprobs)
        if self.strategy.trigger.needs_llm:
            top = state.llm_logits().argmax(-1).tolist()
            probs = _known(state.llm_logprobs(range(len(top)), ids).exp())
            for place, detail in enumerate(details):
                detail.update(llm_probs=probs[place], llm_top_id=top[place])
        return dict(enumerate(details))

    def _note(self, choice: Choice, selection: Selection) -> None:
        """Write a selection into the choice: tokens, and the fields of the Steps."""
        assert choice.candidate_ids is not None and choice.logprobs is not None
        found = _candidate_details(choice.candidate_ids, choice.logprobs)
        index = selection.index.tolist()
        scores = _known(selection.scores) if selection.scores is not None else None
        llm_probs = _known(selection.llm_probs) if selection.llm_probs is not None else None
        own = scores if self._scores_itself else llm_probs if self._llm_tells_all else None
        if any(None in row for row in own or ()):
            raise not_finite(self._read_from(not self._scores_itself))
        for i, (place, token) in enumerate(zip(choice.fired, selection.token_ids.tolist(), strict=True)):
            choice.chosen[place] = token
            detail = choice.details.setdefault(place, {})
            detail.update(found[i], fired=True, selected_index=index[i])
            if scores is not None:
                detail["scores"] = scores[i]
            if llm_probs is not None:
                detail["llm_probs"] = llm_probs[i]

    # Accepting

    def _accept(self, row: Row, places: Places, choice: Choice, steps: list[Step]) -> None:
        """Accept a row's draft up to its first flip or its end, and forget what the models read past that."""
        own = places.of_row[row]
        accepted: list[int] = []
        for place in own:
            accepted.append(self._step(row, place, places, choice, steps))
            if row.is_finished or accepted[-1] != places.tokens[place]:
                break
        if len(own) > 1:
            self.engine.crop([row.slot], [self.engine.lengths[row.slot] - (len(own) - len(accepted))])
        if self.reference is not None:
            self.reference.settle(row.slot, places.draft(row), accepted)
        row.is_ready, row.feed = False, [accepted[-1]]

    def _step(self, row: Row, place: int, places: Places, choice: Choice, steps: list[Step]) -> int:
        """Emit one step of a row; returns its token."""
        token = choice.chosen.get(place, places.tokens[place])
        row.steps, row.last = row.steps + 1, token
        row.flips += place in choice.chosen and token != places.greedy[place]
        reason = None
        if token in self.engine.loaded.stop_ids or (self.ends is not None and self.ends(row.request.index, token)):
            reason = "stop"
        elif row.steps >= row.limit:
            reason = "length"
        row.is_finished = reason is not None
        if self.stream is not None:
            self.stream.push(row.slot, token)
        step = Step(
            row.request.index,
            row.steps - 1,
            token,
            places.greedy[place],
            value=None if choice.values is None else choice.values[place],
            finish_reason=reason,
            **choice.details.get(place, {}),
        )
        steps.append(step)
        return token

    # Rows come and go

    def _retire(self) -> None:
        """Free the slots of finished rows; the last rows move into the gaps."""
        for row in sorted((row for row in self.rows if row.is_finished), key=lambda row: -row.slot):
            llm = self.reference.work[row.slot] if self.reference is not None else Work()
            slm = [self.engine.work[row.slot]]
            if self.stream is not None:
                slm.append(self.stream.engine.work[row.slot])
            self.costs[row.request.index] = _cost(row.steps, slm, llm)
            last = self.rows.pop()
            if last is not row:
                self._move(last, row.slot)

    def _move(self, row: Row, slot: int) -> None:
        assert self.hidden is not None
        self.engine.copy([row.slot], [slot])
        self.engine.work[slot] = self.engine.work[row.slot]
        self.hidden[slot] = self.hidden[row.slot]
        if self.stream is not None:
            self.stream.move(row.slot, slot)
        if self.reference is not None:
            self.reference.move(row.slot, slot)
        self.rows[slot], row.slot = row, slot

    def _admit(self, waiting: deque[Request]) -> None:
        """Give free slots to waiting requests; their prompts run in the next forward, equal prompts once."""
        first: dict[tuple[int, ...], Row] = {}
        num_tokens = 0
        while waiting and len(self.rows) < self.engine.max_rows and num_tokens < _PROMPT_TOKENS_AT_ONCE:
            request = waiting.popleft()
            prompt = tuple(request.prompt_ids)
            limit = request.max_new_tokens or self.max_new_tokens
            draws = self._draws(request)
            row = Row(request, len(self.rows), list(prompt), draws, limit, last=prompt[-1], twin=first.get(prompt))
            if row.twin is None:
                first[prompt] = row
                num_tokens += len(prompt)
            self.rows.append(row)
            self.engine.reset(row.slot)
            if self.stream is not None:
                self.stream.start(row.slot, prompt)
            if self.reference is not None:
                own = request.llm_prompt_ids
                self.reference.start(row.slot, prompt if own is None else own)

    def _draws(self, request: Request) -> np.ndarray:
        strategy = self.strategy
        if strategy.sampling is None and strategy.trigger.name != "random":
            return np.zeros(0)
        return uniforms(strategy.seed, request.key or str(request.index), self.max_new_tokens)

    # Moving on

    def _forward(self, rows: Sequence[int] = (), candidate_ids: Tensor | None = None, back: int = 0) -> Tensor:
        """One forward over what every row has to feed, and over candidates of some rows [f, K]; their states [f, K, H].

        With `back` 1 they stand in the place of the row's last token; see `Engine.step`.
        """
        fed = [row for row in self.rows if row.feed and row.twin is None]
        if not fed:
            return torch.empty(0)
        slots, feeds = [row.slot for row in fed], [row.feed for row in fed]
        states, branch = self.engine.step(slots, feeds, rows, candidate_ids, back)
        if self.hidden is None:
            self.hidden = states.new_zeros(self.engine.max_rows, states.shape[-1])
        self.hidden[[row.slot for row in fed]] = states
        twins = [row for row in self.rows if row.twin is not None]
        if twins:
            source, target = zip(*((row.twin.slot, row.slot) for row in twins if row.twin is not None), strict=True)
            self.engine.copy(source, target)
            self.hidden[list(target)] = self.hidden[list(source)]
        for row in (*fed, *twins):
            row.is_ready, row.feed, row.twin = True, [], None
        return branch

    def _forward_and_select(
        self, places: Places, choice: Choice, undecided: list[tuple[Row, int]], steps: list[Step]
    ) -> None:
        """The forward in which the SLM scores its own candidates, beside the ordinary tokens of all rows.

        A row that selects feeds its greedy token meanwhile: nine times in ten that is the winner, and its ordinary step
        is done. If another wins, its branch is kept (scope `always`), or it is fed by the next forward (`step`, `candidates`
        and `stream`, where what was read is the adapter's and the cache has to be the base model's).
        """
        engine, selector = self.engine, self.strategy.selector
        assert engine.adapter is not None and isinstance(selector, LocalSelector)
        assert choice.candidate_ids is not None and choice.logprobs is not None
        undecided.sort(key=lambda item: item[0].slot)
        slots = [row.slot for row, _ in undecided]
        order = [choice.fired.index(place) for _, place in undecided]
        choice.fired = [place for _, place in undecided]
        choice.candidate_ids, choice.logprobs = choice.candidate_ids[order], choice.logprobs[order]
        keeps_branch, ranks = engine.scope == "always", engine.adapter.ranks
        if keeps_branch:  # the greedy token that the rows feed is candidate 0 itself
            others = choice.candidate_ids[:, 1:]
            branch = self._forward(slots, others) if others.numel() else self._forward()
            assert self.hidden is not None
            first = self.hidden[slots][:, None]
            branch = torch.cat([first, branch], dim=1) if others.numel() else first
        elif self.stream is not None:
            self._forward()
            branch = self.stream.read_last(slots) if ranks else self.stream.read(slots, choice.candidate_ids)
        elif ranks:
            last = torch.tensor([[row.last] for row, _ in undecided], device=engine.device)
            branch = self._forward(slots, last, back=1)
        else:
            branch = self._forward(slots, choice.candidate_ids)
        selection = selector.read(engine.adapter, branch, choice.candidate_ids, choice.logprobs)
        self._note(choice, selection)
        for i, (row, place) in enumerate(undecided):
            token = self._step(row, place, places, choice, steps)
            index = int(selection.index[i])
            if row.is_finished or token == places.greedy[place]:
                continue
            if keeps_branch:
                assert self.hidden is not None
                engine.accept([row.slot], selection.index[i : i + 1] - 1)
                self.hidden[row.slot] = branch[i, index]
            else:
                engine.crop([row.slot], [engine.lengths[row.slot] - 1])
                row.is_ready, row.feed = False, [token]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _cost(generated: int, slm: Sequence[Work], llm: Work) -> Cost:
    forwards, processed = sum(work.forwards for work in slm), sum(work.processed for work in slm)
    flops = sum(work.flops for work in slm)
    return Cost(generated, forwards, llm.forwards, processed, llm.processed, flops, llm.flops)


def _known(values: Tensor) -> list[tuple[float | None, ...]]:
    """Numbers row by row, None where they are not known."""
    return [tuple(None if math.isnan(value) else value for value in row) for row in values.tolist()]


def _candidate_details(ids: Tensor, logprobs: Tensor) -> list[dict]:
    pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return [{"candidates": Candidates(tuple(row_ids), tuple(row_probs))} for row_ids, row_probs in pairs]
