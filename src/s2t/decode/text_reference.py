"""The LLM beside an SLM with another tokenizer: it reads the text written so far and speaks in the SLM's tokens.

Its next-token distribution is projected onto the SLM's vocabulary: q(c) is the probability that its text goes on with
one whose first token, cut by the SLM's tokenizer, is c. Where the LLM spells a candidate in several tokens, the tree
of their spellings is followed. With equal tokenizers q is the LLM's own distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2t.core.support import mask_forbidden
from s2t.decode.reference import EngineReference
from s2t.model.engine import Engine
from s2t.model.text import VocabularyMap

NUM_WANTED = 16  # of the SLM's best tokens, whose spellings are followed
_MIN_PROB = 1e-4  # of a spelling's beginning, to be followed
_NUM_CHILDREN = 64  # of the LLM's tokens behind the beginning of a spelling
_TAIL_SPACES = 3

Path = tuple[int, ...]  # of the LLM's tokens, behind the context


@dataclass(slots=True)
class _Row:
    """What one row's LLM has read, and the text the SLM wrote since the prompt."""

    prompt_ids: list[int] = field(default_factory=list)
    text: bytes = b""
    ids: list[int] = field(default_factory=list)  # in the cache
    hidden: Tensor | None = None  # [H], behind them


@dataclass(slots=True)
class _NextRead:
    """How the next token of one row is read: behind `context`, past the bytes `rest` that stand written already."""

    context: list[int]
    rest: bytes
    inner: dict[Path, bytes]  # proper beginnings of spellings -> their bytes
    written: Path  # the spelling of `rest`


class TextReference(EngineReference):
    """Rows of the LLM's engine that follow the SLM's rows by text; one token of the SLM at a time."""

    max_draft = 1

    def __init__(self, engine: Engine, vocabulary: VocabularyMap) -> None:
        super().__init__(engine)
        self.vocabulary = vocabulary
        self.rows = [_Row() for _ in range(engine.max_rows)]

    def start(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Begin a sequence in a slot, with the LLM's own prompt; nothing is computed yet."""
        super().start(row, prompt_ids)
        self.rows[row] = _Row(list(prompt_ids))

    def ask(self, drafts: Mapping[int, Sequence[int]], suffix_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
        raise NotImplementedError(
            "steps are judged whole, and this LLM reads token by token; the loop refuses the pair"
        )

    def settle(self, row: int, draft: Sequence[int], accepted: Sequence[int]) -> None:
        """The SLM's row went on with these tokens of its own."""
        self.rows[row].text += self.vocabulary.slm_codec.join(accepted)

    def move(self, source: int, target: int) -> None:
        """Let the sequence of slot `source` live in slot `target`."""
        super().move(source, target)
        self.rows[target] = self.rows[source]

    @torch.inference_mode()
    def logits(
        self,
        wanted: Sequence[tuple[int, int]],
        drafts: Mapping[int, Sequence[int]],
        slm_logits: Tensor,
        forbidden_ids: Tensor,
    ) -> Tensor:
        """log q of the next token of some rows on the SLM's vocabulary; slm_logits [n, V] -> [n, V], float32."""
        rows, size = [row for row, _ in wanted], slm_logits.shape[-1]
        best = slm_logits.topk(min(NUM_WANTED, size), dim=-1).indices.tolist()
        plans = [self._plan(self.rows[row], ids) for row, ids in zip(rows, best, strict=True)]
        probs = self._probs(self._catch_up(rows, plans))  # [n, V_L]
        projected = self.vocabulary.project(probs)  # [n, V + 1]
        self._follow(rows, plans, probs, projected)
        logits = projected[:, :size].clamp_min(1e-30).log().to(slm_logits.device)
        return mask_forbidden(logits, forbidden_ids, size)

    def _probs(self, hidden: Tensor) -> Tensor:
        return self.engine.head(hidden)[..., : self.engine.vocab_size].softmax(-1)

    # Planning

    def _plan(self, row: _Row, wanted: Sequence[int]) -> _NextRead:
        """Cut the text with the LLM's tokenizer, step back where a wanted token would change the cut, and spell it."""
        slm, llm = self.vocabulary.slm_codec, self.vocabulary.llm_codec
        ids = [i for i in wanted if slm.bytes_of[i]]
        pieces = [b"", *(slm.bytes_of[i] or b"" for i in ids)]
        whole = llm.encode([row.text])[0]
        tail = row.text[_tail_start(row.text) :]
        spelled = llm.encode([tail + piece for piece in pieces])
        if whole[len(whole) - len(spelled[0]) :] != spelled[0]:  # the tail cannot be cut apart from the rest
            tail = row.text
            spelled = llm.encode([tail + piece for piece in pieces])
        own, *others = slm.encode([tail + piece for piece in pieces])
        behind = spelled[0]
        natural = [path for i, mine, path in zip(ids, others, spelled[1:], strict=True) if mine == [*own, i]]
        kept = min((_common(behind, path) for path in natural), default=len(behind))
        written = tuple(behind[kept:])
        beginnings = {tuple(path[kept:end]) for path in natural for end in range(kept + 1, len(path))}
        beginnings |= {written[:end] for end in range(1, len(written) + 1)}
        inner = {path: llm.join(path) for path in sorted(beginnings)}
        context = row.prompt_ids + whole[: len(whole) - len(behind) + kept]
        return _NextRead(context, llm.join(written), inner, written)

    # Reading

    def _catch_up(self, rows: Sequence[int], plans: Sequence[_NextRead]) -> Tensor:
        """The states behind the contexts, [n, H]; one forward over what is unread."""
        late: list[int] = []
        new: list[list[int]] = []
        for number, plan in zip(rows, plans, strict=True):
            row = self.rows[number]
            if row.hidden is not None and row.ids == plan.context:
                continue
            kept = min(_common(row.ids, plan.context), len(plan.context) - 1)
            self.engine.crop([number], [kept])
            late.append(number)
            new.append(plan.context[kept:])
            row.ids = list(plan.context)
        if late:
            for number, hidden in zip(late, self.engine.extend(late, new), strict=True):
                self.rows[number].hidden = hidden
        return torch.stack([_read(self.rows[number]) for number in rows])

    # Following spellings

    def _follow(self, rows: Sequence[int], plans: Sequence[_NextRead], probs: Tensor, projected: Tensor) -> None:
        """Move the mass of beginnings of spellings to what follows them; and where text stands written, drop the rest."""
        firsts: dict[int, list[int]] = {}  # place -> tokens to read behind
        for place, plan in enumerate(plans):
            if plan.rest:
                self._project_written(plan, probs[place], projected[place])
            floor = _MIN_PROB * (float(probs[place, plan.written[0]]) if plan.written else 1.0)
            tokens = [path[0] for path in plan.inner if len(path) == 1 and float(probs[place, path[0]]) >= floor]
            if tokens:
                firsts[place] = tokens
        if not firsts:
            return
        places = list(firsts)
        width = max(len(tokens) for tokens in firsts.values())
        ids = torch.tensor([(firsts[place] * width)[:width] for place in places], device=self.engine.device)
        order = sorted(range(len(places)), key=lambda i: rows[places[i]])
        hidden = self.engine.branch([rows[places[i]] for i in order], ids[order])  # [n', K', H]
        for i, states in zip(order, hidden, strict=True):
            place = places[i]
            plan, tokens = plans[place], firsts[place]
            for token, child in zip(tokens, self._probs(states[: len(tokens)]), strict=True):
                mass = float(probs[place, token])
                self._take_back(plan, (token,), mass, projected[place])
                self._share_out(rows[place], plan, (token,), mass, child, projected[place])

    def _project_written(self, plan: _NextRead, probs: Tensor, projected: Tensor) -> None:
        """Only tokens that begin with what stands written count, for the text behind it."""
        projected.zero_()
        top = probs.topk(min(_NUM_CHILDREN * 8, len(probs)))
        bytes_of = self.vocabulary.llm_codec.bytes_of
        found = [
            (text[len(plan.rest) :], value)
            for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            if (text := bytes_of[token]) and text.startswith(plan.rest) and len(text) > len(plan.rest)
        ]
        for target, (_, value) in zip(self.vocabulary.first([text for text, _ in found]), found, strict=True):
            projected[target] += value

    def _take_back(self, plan: _NextRead, path: Path, mass: float, projected: Tensor) -> None:
        """What was counted for a path as if the text ended there."""
        text = plan.inner[path]
        if len(text) > len(plan.rest):
            projected[self.vocabulary.first([text[len(plan.rest) :]])[0]] -= mass

    def _share_out(self, row: int, plan: _NextRead, path: Path, mass: float, child: Tensor, projected: Tensor) -> None:
        """Count the mass of a path for what its likeliest continuations begin with; the others share as these do."""
        codec, stops = self.vocabulary.llm_codec, self.vocabulary.llm.stop_ids
        top = child.topk(min(_NUM_CHILDREN, len(child))).indices.tolist()
        spelled = [longer[-1] for longer in plan.inner if longer[:-1] == path]
        tokens = list(dict.fromkeys([*top, *spelled]))
        values = child[tokens]
        values = (values / values.sum()).tolist()
        before = plan.inner[path]
        found: list[tuple[bytes, float]] = []
        deeper: list[tuple[Path, float]] = []
        for token, value in zip(tokens, values, strict=True):
            text = before + (codec.bytes_of[token] or b"")
            if token in stops and len(before) == len(plan.rest) and self.vocabulary.stop_id is not None:
                projected[self.vocabulary.stop_id] += mass * value
            elif (longer := (*path, token)) in plan.inner and (
                value > _MIN_PROB or longer == plan.written[: len(longer)]
            ):
                deeper.append((longer, mass * value))
            elif text.startswith(plan.rest) and len(text) > len(plan.rest):
                found.append((text[len(plan.rest) :], mass * value))
        for target, (_, value) in zip(self.vocabulary.first([text for text, _ in found]), found, strict=True):
            projected[target] += value
        for longer, value in deeper:
            self._share_out(row, plan, longer, value, self._behind(row, longer), projected)

    def _behind(self, row: int, path: Path) -> Tensor:
        """The distribution behind a path of two or more tokens, [V_L]; the row stays as it is."""
        length = self.engine.lengths[row]
        hidden = self.engine.read([row], [list(path)], [1])[0][-1]
        self.engine.crop([row], [length])
        return self._probs(hidden)


def _read(row: _Row) -> Tensor:
    assert row.hidden is not None
    return row.hidden


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        n += 1
    return n


def _tail_start(text: bytes) -> int:
    """Where the last few words begin, at a space: what stands before them is cut into tokens apart from them."""
    at = len(text)
    for _ in range(_TAIL_SPACES):
        at = text.rfind(b" ", 0, at)
        if at < 0:
            return 0
    return at
