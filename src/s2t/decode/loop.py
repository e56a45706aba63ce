"""The package's only decoding loop: B rows with lengths, triggers and ends of their own; yields a Step per token.

Each iteration reads the trigger, lets the selector choose where it fired, emits the tokens, retires finished
rows, admits waiting ones and advances the rest in one forward. Token ids only, never text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from s2t.core.candidates import propose
from s2t.core.sampling import filter_logits, sample, uniforms
from s2t.decode.selectors import Selection
from s2t.decode.state import Reference, State, log_softmax_at
from s2t.decode.strategies import Strategy
from s2t.errors import ConfigError
from s2t.model.engine import Engine, Work
from s2t.records import Candidates, Cost, Step


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to write: prompt ids, and the key its random numbers depend on (with the strategy's seed)."""

    index: int
    prompt_ids: Sequence[int]
    key: str = ""


@dataclass(slots=True)
class _Row:
    request: Request
    steps: int = 0
    draws: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(slots=True)
class _Choice:
    """All of one iteration's decisions, as Python values for the Steps."""

    tokens: list[int]
    greedy: list[int]
    values: list[float] | None
    fired: list[int]  # row numbers
    kept: Selection | None
    details: dict[int, dict]


class Decoder:
    """Runs requests through one strategy; `costs` holds what each finished request cost, by request index."""

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        reference: Reference | None = None,
        max_new_tokens: int = 256,
        trace: bool = False,
    ) -> None:
        if strategy.num_candidates > engine.vocab_size:
            raise ConfigError(
                f"num_candidates must be 1..{engine.vocab_size} (the vocabulary size), got {strategy.num_candidates}; "
                "lower --num-candidates."
            )
        if strategy.needs_llm and reference is None:
            raise ConfigError(f"strategy {strategy.name} reads the LLM at inference; pass --llm.")
        if (strategy.selector is not None and strategy.selector.needs_adapter) and engine.adapter is None:
            raise ConfigError(f"strategy {strategy.name} needs --adapter, a folder written by `s2t train`.")
        self.engine, self.strategy, self.reference = engine, strategy, reference
        self.max_new_tokens, self.trace = max_new_tokens, trace
        self.costs: dict[int, Cost] = {}
        self.rows: list[_Row] = []
        self.hidden: Tensor | None = None  # [max_rows, H]

    def run(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Yield every request's steps, interleaved, each request's in order, until its stop id or the length limit."""
        waiting = deque(requests)
        while waiting or self.rows:
            self._admit(waiting)
            choice = self._choose()
            steps = [self._step(row, choice) for row in range(len(self.rows))]
            self._advance(choice, [row for row, step in enumerate(steps) if step.finish_reason is None])
            yield from steps

    @torch.inference_mode()
    def _admit(self, waiting: deque[Request]) -> None:
        free = self.engine.max_rows - len(self.rows)
        if not waiting or (self.rows and free < max(1, self.engine.max_rows // 8)):
            return
        admitted = [waiting.popleft() for _ in range(min(free, len(waiting)))]
        first: dict[tuple[int, ...], int] = {}
        copies: list[tuple[int, int]] = []
        for request in admitted:
            row = len(self.rows)
            self.rows.append(_Row(request, draws=self._draws(request)))
            self.engine.reset(row)
            if self.reference is not None:
                self.reference.start(row, request.prompt_ids)
            prompt = tuple(request.prompt_ids)
            if prompt in first:
                copies.append((first[prompt], row))
            else:
                first[prompt] = row
        self._store(list(first.values()), self.engine.extend(list(first.values()), list(first)))
        if copies:
            source, target = zip(*copies, strict=True)
            self.engine.copy(source, target)
            assert self.hidden is not None
            self.hidden[list(target)] = self.hidden[list(source)]

    def _draws(self, request: Request) -> np.ndarray:
        strategy = self.strategy
        if strategy.sampling is None and strategy.trigger.name != "random":
            return np.zeros(0)
        return uniforms(strategy.seed, request.key or str(request.index), self.max_new_tokens)

    def _store(self, rows: Sequence[int], hidden: Tensor) -> None:
        if self.hidden is None:
            self.hidden = hidden.new_zeros(self.engine.max_rows, hidden.shape[-1])
        self.hidden[list(rows)] = hidden

    @torch.inference_mode()
    def _choose(self) -> _Choice:
        assert self.hidden is not None
        count, strategy = len(self.rows), self.strategy
        hidden = self.hidden[:count]
        state = State(self.engine, hidden, self.engine.logits(hidden), self._uniforms(), self.reference)
        greedy = state.logits.argmax(-1)
        tokens = greedy if strategy.sampling is None else self._sample(state)
        values = strategy.trigger.read(state)
        fired = self._fired(values)
        details = self._trace_details(state) if self.trace else {}
        kept = None
        if fired:
            ids, logprobs = propose(state.logits[fired], strategy.num_candidates)
            assert strategy.selector is not None
            selection = strategy.selector.select(state, fired, ids, logprobs)
            tokens = tokens.index_copy(0, torch.tensor(fired, device=tokens.device), selection.token_ids)
            _add_details(details, fired, ids, logprobs, selection)
            kept = selection if selection.is_kept else None
        read = None if values is None else values.tolist()
        return _Choice(tokens.tolist(), greedy.tolist(), read, fired, kept, details)

    def _uniforms(self) -> Tensor:
        draws = [row.draws[row.steps] if row.steps < len(row.draws) else 0.0 for row in self.rows]
        return torch.tensor(draws, dtype=torch.float64, device=self.engine.device)

    def _sample(self, state: State) -> Tensor:
        how = self.strategy.sampling
        assert how is not None
        return sample(filter_logits(state.logits, how.temperature, how.top_k, how.top_p, how.min_p), state.uniforms)

    def _fired(self, values: Tensor | None) -> list[int]:
        if values is None:
            return []
        fires = self.strategy.trigger.fires(values, self.strategy.threshold).tolist()
        warmup = self.strategy.warmup_steps
        return [row for row, fire in enumerate(fires) if fire and self.rows[row].steps >= warmup]

    def _trace_details(self, state: State) -> dict[int, dict]:
        ids, logprobs = propose(state.logits, self.strategy.num_candidates)
        details = _candidate_details(ids, logprobs)
        if self.strategy.trigger.needs_llm:
            logits = state.llm_logits()
            probs, top = log_softmax_at(logits, ids).exp().tolist(), logits.argmax(-1).tolist()
            for row, detail in enumerate(details):
                detail.update(llm_probs=tuple(probs[row]), llm_top_id=top[row])
        return dict(enumerate(details))

    def _step(self, row: int, choice: _Choice) -> Step:
        state = self.rows[row]
        state.steps += 1
        token = choice.tokens[row]
        reason = None
        if token in self.engine.loaded.stop_ids:
            reason = "stop"
        elif state.steps >= self.max_new_tokens:
            reason = "length"
        return Step(
            request=state.request.index,
            index=state.steps - 1,
            token_id=token,
            greedy_id=choice.greedy[row],
            fired="fired" in choice.details.get(row, {}),
            value=None if choice.values is None else choice.values[row],
            finish_reason=reason,
            **{key: value for key, value in choice.details.get(row, {}).items() if key != "fired"},
        )

    @torch.inference_mode()
    def _advance(self, choice: _Choice, alive: list[int]) -> None:
        """Run the accepted tokens of rows that go on (unless a kept branch did), and close the gaps of those that ended."""
        kept_rows = choice.fired if choice.kept is not None else []
        plain = [row for row in alive if row not in set(kept_rows)]
        if plain:
            self._store(plain, self.engine.extend(plain, [[choice.tokens[row]] for row in plain]))
        if choice.kept is not None:
            assert choice.kept.hidden is not None
            self._store(kept_rows, choice.kept.hidden)
        if self.reference is not None:
            for row in alive:
                self.reference.push(row, choice.tokens[row])
        self._retire(set(range(len(self.rows))) - set(alive))

    def _retire(self, ended: set[int]) -> None:
        for row in sorted(ended):
            state = self.rows[row]
            llm = self.reference.engine.work[row] if self.reference is not None else Work()
            self.costs[state.request.index] = _cost(state.steps, self.engine.work[row], llm)
        for row in sorted(ended, reverse=True):
            last = len(self.rows) - 1
            if row != last:
                self._move(last, row)
            self.rows.pop()

    def _move(self, source: int, target: int) -> None:
        assert self.hidden is not None
        self.engine.copy([source], [target])
        self.engine.work[target] = self.engine.work[source]
        self.hidden[target] = self.hidden[source]
        self.rows[target] = self.rows[source]
        if self.reference is not None:
            self.reference.move(source, target)


def _cost(generated: int, slm: Work, llm: Work) -> Cost:
    return Cost(generated, slm.forwards, llm.forwards, slm.processed, llm.processed, slm.flops, llm.flops)


def _candidate_details(ids: Tensor, logprobs: Tensor) -> list[dict]:
    pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return [{"candidates": Candidates(tuple(row_ids), tuple(row_probs))} for row_ids, row_probs in pairs]


def _add_details(
    details: dict[int, dict], fired: list[int], ids: Tensor, logprobs: Tensor, selection: Selection
) -> None:
    found = _candidate_details(ids, logprobs)
    index = selection.index.tolist()
    scores = selection.scores.tolist() if selection.scores is not None else None
    llm_probs = selection.llm_probs.tolist() if selection.llm_probs is not None else None
    for place, row in enumerate(fired):
        detail = details.setdefault(row, {})
        detail.update(found[place], fired=True, selected_index=index[place])
        if scores is not None:
            detail["scores"] = tuple(scores[place])
        if llm_probs is not None:
            detail["llm_probs"] = tuple(llm_probs[place])
