"""One round of the loop over the engines: what methods may ask of it, and how it ends, with one forward for all rows.

A selector that asks for states under the adapter has them from that very forward. Until then its rows wait and feed their greedy
tokens, nine times in ten the winners; so a triggered step costs no forward more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from s2t.core.rule import finish_reason
from s2t.core.support import logprobs_at
from s2t.decode.batch import Batch, Row
from s2t.decode.steps import StepTexts
from s2t.methods.base import Ahead, Proposal, Round, Selection
from s2t.methods.strategies import Strategy
from s2t.model.adapter import SelectorReader
from s2t.model.checkpoint import not_finite
from s2t.model.engine import Engine
from s2t.records import Candidates, Step


class EngineRound(Round):
    """The next tokens of all ready rows and, beside an LLM, a draft behind each, depth by depth; `steps` is what came of it."""

    def __init__(
        self,
        batch: Batch,
        rows: list[Row],
        offsets: list[int],
        hidden: Tensor,
        logits: Tensor,
        greedy: list[int],
        tokens: list[int],
        texts: StepTexts | None = None,
    ) -> None:
        self.texts = texts
        self.batch, self.rows, self.offsets = batch, rows, offsets
        self.hidden, self.own_logits, self.greedy, self.tokens = hidden, logits, greedy, tokens
        self.num_written = [row.steps + offset for row, offset in zip(rows, offsets, strict=True)]
        self.places: dict[Row, list[int]] = {}  # a row's, in order
        for place, row in enumerate(rows):
            self.places.setdefault(row, []).append(place)
        self._left: dict[int, int] = {}  # place -> tokens for which its span goes on behind it
        self.values: list[float] | None = None  # what the trigger read
        self.details: dict[int, dict] = {}  # place -> fields of its Step
        self.steps: list[Step] = []
        self.taken: list[int] = []  # the places of these steps
        self._chosen: dict[int, tuple[int, int]] = {}  # place -> token, index among the candidates
        self._waiting: dict[int, Tensor | None] = {}
        """Places that are being chosen for, whose rows feed their greedy tokens meanwhile -> None, or under scope `always` the
        candidates' states [K, H]."""
        self.num_listed = batch.reference.num_listed if batch.reference is not None else None
        self._llm_logits: Tensor | None = None
        self._has_gone_on = False
        self._ends_with_steps = False

    # What methods may ask for

    @cached_property
    def logits(self) -> Tensor:  # type: ignore[override]
        return self.own_logits.float()

    @property
    def draws(self) -> Tensor:
        return self.batch.draws(self.rows, self.offsets)

    def uniforms(self, stream: int) -> Tensor:
        return self.batch.draws(self.rows, self.offsets, stream)

    @property
    def keys(self) -> list[str]:
        return [row.request.key for row in self.rows]

    @property
    def drafts(self) -> list[list[int]]:
        return list(self.places.values())

    @property
    def held(self) -> list[bool]:
        return [row.held > 0 for row in self.rows]

    @property
    def starts(self) -> list[bool]:
        return [is_start for is_start, _ in self._texts_before]

    def tail(self, place: int) -> str:
        return self._texts_before[place][1]

    def note(self, place: int, numbers: Sequence[float]) -> None:
        self.details.setdefault(place, {})["notes"] = tuple(numbers)

    def ask(self, rows: Sequence[int], question: str, answers: Sequence[str]) -> Tensor:
        reference, texts = self.batch.reference, self.texts
        assert reference is not None and texts is not None
        drafted = self.drafts
        places = [drafted[i] for i in rows]
        drafts = {self.rows[own[0]].slot: [self.tokens[place] for place in own] for own in places}
        reference.read(drafts)
        return reference.ask(drafts, texts.ids(question), [texts.ids(answer)[-1] for answer in answers])

    def embed(self, ids: Tensor) -> Tensor:
        return self.batch.engine.model.get_input_embeddings()(ids)

    def layer_logits(self, places: Sequence[int]) -> Tensor:
        return self.batch.engine.layer_logits(self.hidden[list(places)])

    @property
    def adapter(self) -> SelectorReader:
        assert self.batch.engine.adapter is not None, "the method needs an adapter"
        return self.batch.engine.adapter

    def llm_logits(self, places: Sequence[int] | None = None) -> Tensor:
        return self.own_llm_logits(places).float()

    def own_llm_logits(self, places: Sequence[int] | None = None) -> Tensor:
        if self._llm_logits is not None:
            return self._llm_logits if places is None else self._llm_logits[list(places)]
        reference, every = self.batch.reference, places is None or len(places) == len(self.rows)
        assert reference is not None, "the method needs the LLM"
        wanted = range(len(self.rows)) if places is None else places
        own = self.own_logits if every else self.own_logits[list(wanted)]
        asked, drafts = self._asked(wanted)
        reference.read(drafts)
        logits = reference.logits(asked, drafts, own, self.batch.engine.forbidden_ids)
        if places is None:
            self._llm_logits = logits
        return logits

    def llm_logprobs(self, places: Sequence[int], ids: Tensor, must_order: bool = False) -> Tensor:
        assert self.batch.reference is not None
        logprobs = logprobs_at(self.own_llm_logits(places), ids)
        if self.num_listed is None:
            return logprobs
        return self.batch.reference.look_up(*self._asked(places), ids, logprobs, must_order)

    def _asked(self, places: Sequence[int]) -> tuple[list[tuple[int, int]], dict[int, list[int]]]:
        """Places as the LLM beside the loop takes them: (row, offset) of each, and the drafts of these rows."""
        rows = dict.fromkeys(self.rows[place] for place in places)
        drafts = {row.slot: [self.tokens[place] for place in self.places[row]] for row in rows}
        return [(self.rows[place].slot, self.offsets[place]) for place in places], drafts

    def ahead(self, places: Sequence[int], ids: Tensor, depth: int, reads_end: bool) -> Ahead:
        engine = self.batch.engine
        slots = [self.rows[place].slot for place in places]
        order = sorted(range(len(slots)), key=slots.__getitem__)  # the engine takes rows in order
        branches = [branch(engine, [slots[i] for i in order], one, depth, reads_end) for one in ids[order].unbind(-1)]
        back = torch.tensor(order, device=ids.device).argsort()
        states = torch.stack([one.states for one in branches], 1)[back] if reads_end else None  # type: ignore[arg-type]
        return Ahead(states, *(torch.stack(parts, 1)[back] for parts in list(zip(*branches, strict=True))[1:]))

    def states(self, places: Sequence[int], ids: Tensor | None = None) -> Tensor:
        self._waiting = dict.fromkeys(places)
        self._go_on()
        slots = [self.rows[place].slot for place in places]
        order = sorted(range(len(slots)), key=slots.__getitem__)
        if order == list(range(len(slots))):
            states = self._read(slots, ids)
        else:  # `retire` moved rows, and the engine takes them in the order of their slots
            states = self._read([slots[i] for i in order], None if ids is None else ids[order])
            states = states[torch.tensor(order).argsort().to(states.device)]
        if self.batch.engine.scope == "always":  # what was read is what the next token comes from
            self._waiting = dict(zip(places, states, strict=True))
        return states

    def _read(self, slots: Sequence[int], ids: Tensor | None) -> Tensor:
        """The forward of the round, with what the adapter reads of rows that wait, in the order of their slots."""
        batch = self.batch
        if batch.stream is not None:
            batch.forward()
            return batch.stream.read_last(slots) if ids is None else batch.stream.read(slots, ids)
        if ids is None:
            last = torch.tensor([[batch.rows[slot].last] for slot in slots], device=batch.engine.device)
            return batch.forward(slots, last, back=1)
        if batch.engine.scope != "always":
            return batch.forward(slots, ids)
        others = ids[:, 1:]  # candidate 0 is the greedy token, which the rows feed
        branch = batch.forward(slots, others) if others.numel() else batch.forward()
        assert batch.hidden is not None
        first = batch.hidden[slots][:, None]
        return torch.cat([first, branch], dim=1) if others.numel() else first

    # Steps of the text, and spans

    @cached_property
    def _texts_before(self) -> list[tuple[bool, str]]:
        """Whether each place begins a step, and what stands before it; read once, before any token is accepted."""
        assert self.texts is not None, "the method reads no text"
        before = [(False, "")] * len(self.rows)
        for row, places in self.places.items():
            is_start, tail = row.is_start, row.tail
            for place in places:
                before[place] = is_start, tail
                is_start, tail = self.texts.ends(tail, self.tokens[place]), self.texts.after(tail, self.tokens[place])
        return before

    def hold(self, fires: Sequence[bool], strategy: Strategy) -> list[int]:
        """The places that fire, or that a span holds: from one that fired, for so many tokens or to the end of the step."""
        assert self.texts is not None and self.values is not None
        fired = []
        for row, places in self.places.items():
            left = row.held
            for place in places:
                if not left and fires[place] and self.num_written[place] >= strategy.warmup_steps:
                    left = strategy.trigger.hold(self.values[place]) or strategy.span_tokens
                if not left:
                    continue
                fired.append(place)
                left = self._left[place] = left - 1
                if strategy.ends_with_steps and self.texts.ends(self.tail(place), self.tokens[place]):
                    left = 0
        self._ends_with_steps = strategy.ends_with_steps
        return sorted(fired)

    def _note_text(self, row: Row, place: int, token: int) -> None:
        """What the row's text and span are behind a token that was accepted."""
        assert self.texts is not None
        row.is_start, row.tail = self.texts.ends(row.tail, token), self.texts.after(row.tail, token)
        row.held = 0 if row.is_start and self._ends_with_steps else self._left.get(place, 0)

    # How it ends

    def note_choice(self, fired: Sequence[int], candidates: Proposal, selection: Selection, is_llm: bool) -> None:
        """Note what a selector chose; raises ModelError where a number that it read, of the LLM or the SLM, is NaN."""
        tokens, index = selection.token_ids.tolist(), selection.index.tolist()
        read = {"scores": selection.scores, "llm_probs": selection.llm_probs}
        numbers = {field: known(values) for field, values in read.items() if values is not None}
        if self.num_listed is None and any(None in row for rows in numbers.values() for row in rows):
            raise not_finite(self.batch.name_of(is_llm))
        for i, (place, own) in enumerate(zip(fired, candidates_of(candidates), strict=True)):
            self._chosen[place] = tokens[i], index[i]
            detail = self.details.setdefault(place, {})
            detail.update(candidates=own, fired=True, selected_index=index[i])
            detail.update((field, rows[i]) for field, rows in numbers.items())

    def finish(self) -> None:
        """Accept what is due, and run the forward that all rows wait for, unless a selector has asked for it."""
        if not self._has_gone_on:
            self._go_on()
            self.batch.forward()
        for place, states in self._waiting.items():
            self._settle(place, states)
        self.batch.retire()

    def _go_on(self) -> None:
        """Accept the tokens of rows that wait for nothing, let new rows in, and have those that wait feed their greedy tokens."""
        assert not self._has_gone_on, "states are asked for once a round"
        self._has_gone_on = True
        for row, places in self.places.items():
            if places[0] in self._waiting:
                row.is_ready, row.feed = False, [self.greedy[places[0]]]
            else:
                self._accept(row, places)
        self.batch.retire()
        self.batch.admit()

    def _accept(self, row: Row, places: Sequence[int]) -> None:
        """Accept a row's draft up to its first flip or its end, and forget what the models read past that."""
        accepted: list[int] = []
        for place in places:
            accepted.append(self._step(row, place))
            if row.is_finished or accepted[-1] != self.tokens[place]:
                break
        engine, reference = self.batch.engine, self.batch.reference
        if len(places) > 1:
            engine.crop([row.slot], [engine.lengths[row.slot] - (len(places) - len(accepted))])
        if reference is not None:
            reference.settle(row.slot, [self.tokens[place] for place in places], accepted)
        row.is_ready, row.feed = False, [accepted[-1]]

    def _settle(self, place: int, states: Tensor | None) -> None:
        """Accept the winner of a row that has fed its greedy token:

        - the greedy token: it stands in the cache already;
        - another, with states [K, H] (scope `always`, where what was read is the model's own): its branch is kept;
        - another, without: the greedy token is taken out of the cache, and the next forward feeds the winner.
        """
        row, engine, hidden = self.rows[place], self.batch.engine, self.batch.hidden
        token = self._step(row, place)
        if self.batch.reference is not None:
            self.batch.reference.settle(row.slot, [self.greedy[place]], [token])
        if row.is_finished or token == self.greedy[place]:
            return
        if states is not None and hidden is not None:
            index = self._chosen[place][1]
            engine.keep_branch([row.slot], torch.tensor([index - 1]))  # it holds candidates 1 to K - 1, see _read
            hidden[row.slot] = states[index]
        else:
            engine.crop([row.slot], [engine.lengths[row.slot] - 1])
            row.is_ready, row.feed = False, [token]

    def _step(self, row: Row, place: int) -> int:
        """Emit one step of a row; returns its token."""
        batch, greedy = self.batch, self.greedy[place]
        token = self._chosen[place][0] if place in self._chosen else self.tokens[place]
        row.steps, row.last = row.steps + 1, token
        row.flips += place in self._chosen and token != self.tokens[place]
        if self.texts is not None:
            self._note_text(row, place, token)
        is_stop = token in batch.engine.loaded.stop_ids or (
            batch.ends is not None and batch.ends(row.request.index, token)
        )
        reason = finish_reason(is_stop, row.steps, row.limit)
        row.is_finished = reason is not None
        if batch.stream is not None:
            batch.stream.push(row.slot, token)
        value = None if self.values is None else self.values[place]
        details = self.details.get(place, {})
        self.steps.append(
            Step(row.request.index, row.steps - 1, token, greedy, value=value, finish_reason=reason, **details)
        )
        self.taken.append(place)
        return token


def known(values: Tensor) -> list[tuple[float | None, ...]]:
    """Numbers row by row, None where they are not known."""
    return [tuple(None if math.isnan(value) else value for value in row) for row in values.tolist()]


def candidates_of(proposal: Proposal) -> list[Candidates]:
    """The candidates of each place, as Steps have them."""
    pairs = zip(proposal.ids.tolist(), proposal.logprobs.tolist(), strict=True)
    return [Candidates(tuple(ids), tuple(logprobs)) for ids, logprobs in pairs]


@torch.inference_mode()
def branch(engine: Engine, rows: Sequence[int], first: Tensor, depth: int, reads_end: bool) -> Ahead:
    """One branch of each row: its candidate [f] and the greedy tokens behind it, `depth` in all or to a stop id.

    What comes back has no axis of candidates: states [f, H] of the last tokens, under the adapter, log-probabilities and counts
    [f]. The rows are as before.
    """
    lengths = [engine.lengths[row] for row in rows]
    last = first.clone()
    logprobs, counts = torch.zeros(len(rows), device=last.device), torch.ones(len(rows), device=last.device)
    for _ in range(depth - 1):
        live = [i for i, token in enumerate(last.tolist()) if token not in engine.loaded.stop_ids]
        if not live:
            break
        hidden = engine.extend([rows[i] for i in live], [[int(last[i])] for i in live])
        best = engine.logits(hidden).log_softmax(-1).max(-1)
        last[live], counts[live] = best.indices, counts[live] + 1
        logprobs[live] += best.values
    states = engine.branch(rows, last[:, None])[:, 0] if reads_end else None
    engine.crop(rows, lengths)
    return Ahead(states, logprobs, counts)
