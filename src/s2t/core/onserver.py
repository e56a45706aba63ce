"""S2T-LOCAL inside a server's sampler: what a logits processor does at every token, and how its replies are read.

A server's logits processor sees each step's logits before they are sampled and can force a token. That is enough to end a
request at a trigger, to pass the triggers that no other candidate could win, and to choose between the candidates where
one could: as rows of a group, each of which begins with one candidate, and of which the winner goes on. What the client must
know is told behind the text, in reserved ids, which text never holds. Knows no server; `integrations.vllm` plugs it in.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

READING, ROOM, WARMUP, AT, GROUP, ROWS = "s2t", "s2t_room", "s2t_warmup", "s2t_at", "s2t_group", "s2t_rows"
MOST_PASSED = 8
"""Triggers that a request passes before it ends to tell of them."""
_LONGEST_WAIT = 64  # steps that a row waits for the others of its group
_MOST_GROUPS = 4096
_MARGIN = 1e-5  # a candidate that could come so close to the greedy one is looked at
_NEVER = float("-inf")


@dataclass(frozen=True)
class Reading:
    """How a run reads its selector; equal for all its requests.

    `threshold` is on criticality, None where `Ask.at` lists the steps that trigger. `forbidden` are ranges of ids, [start, end).
    """

    bins: tuple[int, ...]
    yes_no: tuple[int, int] | None
    threshold: float | None
    temperature: float
    prior_weight: float
    num_candidates: int
    stops: tuple[int, ...]
    forbidden: tuple[tuple[int, int], ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.is_possible or (self.threshold is not None and self.yes_no is None) or self.num_candidates < 1:
            raise ValueError("s2t: the ids do not suffice for this reading")

    @property
    def is_possible(self) -> bool:
        """Whether there are reserved ids enough to tell the client what it must know."""
        return len(self.bins) + len(self.yes_no or ()) >= 6

    @cached_property
    def _told(self) -> tuple[int, ...]:
        return (*self.bins, *(self.yes_no or ()))

    @property
    def digits(self) -> tuple[int, ...]:
        """Ids that stand for numbers."""
        return self._told[:-4]

    @property
    def pad(self) -> int:
        return self._told[-4]

    @property
    def trigger(self) -> int:
        """Ends a request at a trigger."""
        return self._told[-3]

    @property
    def end(self) -> int:
        """Ends a request whose text is complete."""
        return self._told[-2]

    @property
    def lost(self) -> int:
        """Ends a row that lost against another, or one that holds nothing."""
        return self._told[-1]

    @property
    def marks(self) -> tuple[int, int, int]:
        """What the server must stop at."""
        return self.trigger, self.end, self.lost

    def fits(self, vocab_size: int) -> bool:
        """Whether all ids are rows of the logits."""
        ids = [*self.bins, *(self.yes_no or ()), *(i for start, end in self.forbidden for i in (start, end - 1))]
        return all(0 <= i < vocab_size for i in ids) and self.num_candidates <= vocab_size

    def to_json(self) -> str:
        """As the server takes it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Reading:
        """From what a client sent; raises ValueError for what is none."""
        return _reading(text)

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """Ids of one kind as an index."""
        return _index(self, name, device)

    def width(self, most: int) -> int:
        """Digits that a number up to `most` takes."""
        count, size = 1, len(self.digits)
        while size**count <= most:
            count += 1
        return count

    def spell(self, number: int, most: int) -> list[int]:
        """A number as ids."""
        found = []
        for _ in range(self.width(most)):
            number, digit = divmod(number, len(self.digits))
            found.append(self.digits[digit])
        return found[::-1]

    def number(self, ids: Sequence[int]) -> int:
        """The number that some ids spell; raises ValueError where they spell none."""
        found = 0
        for i in ids:
            found = found * len(self.digits) + self.digits.index(i)
        return found

    def num_extra(self, room: int) -> int:
        """Tokens that a reply may hold behind its text."""
        return MOST_PASSED * self.width(room) + self.width(self.num_candidates) + 1

    def score(self, expected: float, logit: float) -> float:
        """Of a candidate, up to a constant of the step."""
        return expected / self.temperature + (self.prior_weight * logit if self.prior_weight else 0.0)


@lru_cache(maxsize=256)
def _reading(text: str) -> Reading:
    try:
        found = json.loads(text)
        found["bins"], found["stops"] = tuple(map(int, found["bins"])), tuple(map(int, found["stops"]))
        found["yes_no"] = tuple(map(int, found["yes_no"])) if found["yes_no"] else None
        found["forbidden"] = tuple((int(start), int(end)) for start, end in found["forbidden"])
        return Reading(**found)
    except (KeyError, TypeError) as error:
        raise ValueError(f"s2t: no reading of a selector: {error}") from error


@lru_cache(maxsize=256)
def _index(reading: Reading, name: str, device: torch.device) -> Tensor:
    if name == "forbidden":
        ids = [i for start, end in reading.forbidden for i in range(start, end)]
    else:
        ids = list(getattr(reading, name))
    return torch.tensor(ids, dtype=torch.long, device=device)


def ranges(ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Sorted ids as ranges [start, end)."""
    found: list[tuple[int, int]] = []
    for i in sorted(set(ids)):
        if found and found[-1][1] == i:
            found[-1] = (found[-1][0], i + 1)
        else:
            found.append((i, i + 1))
    return tuple(found)


# What a reply says


@dataclass(frozen=True, slots=True)
class Told:
    """A reply: its text, which of its tokens triggered and were passed, and how it ended."""

    ids: list[int]
    passed: frozenset[int]
    is_lost: bool = False
    num_rows: int = 0
    """Where it ended at a trigger: how many candidates, best first, might win. The greedy one is the text's last token."""


def read(ids: Sequence[int], reading: Reading, room: int) -> Told:
    """What the plug-in told; a reply that does not end with one of its marks, or is garbled, counts as lost."""
    reserved = frozenset(reading._told)
    size = next((i for i, token in enumerate(ids) if token in reserved), len(ids))
    text, tail = list(ids[:size]), [i for i in ids[size:] if i != reading.pad]
    lost = Told(text, frozenset(), True)
    if not tail or tail[-1] not in (reading.trigger, reading.end):
        return lost
    last, numbers, rows = tail[-1], tail[:-1], 0
    try:
        if last == reading.trigger:
            width = reading.width(reading.num_candidates)
            rows, numbers = reading.number(numbers[-width:]), numbers[:-width]
        width = reading.width(room)
        passed = frozenset(reading.number(numbers[at : at + width]) for at in range(0, len(numbers), width))
    except ValueError:
        return lost
    if any(place >= size for place in passed) or (rows and not text):
        return lost
    return Told(text, passed, num_rows=rows)


# What the server does


@dataclass(slots=True)
class Group:
    """Rows that begin with the candidates of one step; `winner` once all have been scored, -1 where none can be named."""

    num_rows: int
    joined: int = 0
    scores: dict[int, float] = field(default_factory=dict)
    firsts: dict[int, int] = field(default_factory=dict)
    expected_firsts: tuple[int, ...] = ()
    winner: int | None = None

    def decide(self) -> None:
        """Name the winner if everything is there."""
        if self.winner is not None or len(self.scores) < self.num_rows:
            return
        same = all(self.expected_firsts[rank] == first for rank, first in self.firsts.items())
        best = max(self.scores, key=lambda rank: (self.scores[rank], -rank))
        self.winner = best if same else -1


@dataclass(slots=True)
class Row:
    """One request that asks for selection, from its first token to its last mark."""

    reading: Reading
    room: int
    warmup: int
    at: frozenset[int]
    group: Group | None = None
    rank: int = 0
    is_void: bool = False
    last: int = -1  # the token that was written before
    logits: tuple[float, ...] = ()  # of the K candidates at the step last looked at, best first
    waits_since: int | None = None  # place of a trigger whose greedy token has been written and is scored now
    passed: list[int] = field(default_factory=list)
    num_text: int = -1  # tokens of text, once it is complete
    tail: list[int] = field(default_factory=list)
    is_frozen: bool = False

    @classmethod
    def of(cls, args: Mapping[str, Any], groups: OrderedDict[str, Group], written: int) -> Row:
        """From a request's extra arguments; one that has written already was interrupted, and holds nothing."""
        reading, rows = Reading.from_json(str(args[READING])), int(args.get(ROWS, 1))
        row = cls(reading, int(args[ROOM]), int(args.get(WARMUP, 0)), frozenset(map(int, args.get(AT, ()))))
        if row.room < 1 or not 1 <= rows <= reading.num_candidates:
            raise ValueError(f"s2t: {row.room} tokens and {rows} candidates cannot be asked for")
        row.is_void = written > 0
        if (name := args.get(GROUP)) is not None and not row.is_void:
            group = groups.get(name)
            if group is None or group.joined == group.num_rows:
                group = groups[name] = Group(rows)
                while len(groups) > _MOST_GROUPS:
                    groups.popitem(last=False)
            row.group, row.rank = group, group.joined
            group.joined += 1
        return row

    def needs_bins(self, written: int) -> bool:
        """Whether the token before is a candidate to score."""
        return self.num_text < 0 and (self.waits_since is not None or (self.group is not None and written == 1))

    def triggers(self, written: int, fired: bool) -> bool:
        """Whether the step that comes is one where candidates are looked at."""
        return written >= self.warmup and (fired if self.reading.threshold is not None else written in self.at)

    def finish(self, written: int, *marks: int) -> None:
        """The text is complete; the passed triggers and some marks follow."""
        told = [digit for place in self.passed for digit in self.reading.spell(place, self.room)]
        self.num_text, self.tail = written, [*told, *marks]

    def settle(self, written: int, expected: float) -> None:
        """The greedy token of a trigger has been scored: go on with it, or end where another candidate might win."""
        assert self.waits_since is not None
        reading, (greedy, *others) = self.reading, self.logits
        best = reading.score(expected, greedy) - _MARGIN
        rows = 1 + sum(other > _NEVER and reading.score(1.0, other) > best for other in others)
        most = reading.num_candidates
        if rows > 1:
            self.finish(written, *reading.spell(rows, most), reading.trigger)
        else:
            self.passed.append(self.waits_since)
            if len(self.passed) == MOST_PASSED:
                self.finish(written, *reading.spell(0, most), reading.trigger)
        self.waits_since = None

    def follow_group(self, written: int) -> None:
        """Behind its first token: go on as the winner, end as a loser, or wait."""
        group, reading = self.group, self.reading
        assert group is not None
        if group.winner is None and written <= _LONGEST_WAIT:
            self.is_frozen = True
        elif group.winner != self.rank:
            self.num_text, self.tail = written, [reading.lost]
        elif self.is_frozen:  # what it wrote while waiting is no text
            self.num_text, self.tail = written, [*reading.spell(0, reading.num_candidates), reading.trigger]
        else:
            self.group = None


class Plugin:
    """The logits processor's work, with no server around it: `apply` at every step, rows in the caller's keeping."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.groups: OrderedDict[str, Group] = OrderedDict()

    def new_row(self, args: Mapping[str, Any] | None, written: int = 0) -> Row | None:
        """The state of a request; None for one that does not ask, or asks for ids that are none."""
        if not args or READING not in args or not Reading.from_json(str(args[READING])).fits(self.vocab_size):
            return None
        return Row.of(args, self.groups, written)

    @torch.inference_mode()
    def apply(self, logits: Tensor, places: Sequence[tuple[int, Row, int]]) -> Tensor:
        """Mask, watch and force: logits [B, V] in place; `places` are (index, row, tokens written) of those that ask."""
        readings: dict[int, list[tuple[int, Row, int]]] = {}
        for place in places:
            readings.setdefault(id(place[1].reading), []).append(place)
        for members in readings.values():
            self._apply(logits, members)
        return logits

    def _apply(self, logits: Tensor, members: list[tuple[int, Row, int]]) -> None:
        reading = members[0][1].reading
        for _, row, written in members:
            row.is_void |= written > 0 and row.last < 0  # it was interrupted, and what it was is gone
        index = torch.tensor([i for i, _, _ in members], device=logits.device)
        fired = self._fired(logits, index, reading)
        expected = self._expected(logits, members, reading)
        self._mask(logits, index, len(members), reading)
        best = (logits if len(members) == logits.shape[0] else logits[index]).argmax(-1).tolist()
        order = range(len(members)) if len(members) != logits.shape[0] else index.tolist()
        for (_, row, written), value in expected:  # groups are decided before their rows go on
            if row.group is not None:
                self._enter(row, value)
            else:
                row.settle(written, value)
        for (i, row, written), fires, at in zip(members, fired, order, strict=True):
            token = self._step(row, written, fires, best[at], logits[i])
            if token is not None:
                logits[i] = _NEVER
                logits[i, token] = 0.0

    def _fired(self, logits: Tensor, index: Tensor, reading: Reading) -> list[bool]:
        if reading.threshold is None or reading.yes_no is None:
            return [False] * len(index)
        yes, no = (logits[index, i].float() for i in reading.yes_no)
        return (((yes - no) / reading.scale).sigmoid() > reading.threshold).tolist()

    def _expected(
        self, logits: Tensor, members: list[tuple[int, Row, int]], reading: Reading
    ) -> list[tuple[tuple[int, Row, int], float]]:
        """Expected bin of the tokens before, where they are candidates."""
        asked = [member for member in members if not member[1].is_void and member[1].needs_bins(member[2])]
        if not asked:
            return []
        rows = torch.tensor([i for i, _, _ in asked], device=logits.device)
        bins = logits[rows][:, reading.tensor("bins", logits.device)].float() / reading.scale  # [n, R]
        levels = torch.linspace(0.0, 1.0, bins.shape[-1], device=bins.device)
        return list(zip(asked, (bins.softmax(-1) @ levels).tolist(), strict=True))

    def _mask(self, logits: Tensor, index: Tensor, count: int, reading: Reading) -> None:
        if count == logits.shape[0]:
            logits.index_fill_(1, reading.tensor("forbidden", logits.device), _NEVER)
        else:
            logits[index[:, None], reading.tensor("forbidden", logits.device)] = _NEVER

    def _enter(self, row: Row, expected: float) -> None:
        group = row.group
        assert group is not None
        group.scores[row.rank] = row.reading.score(expected, row.logits[row.rank])
        group.firsts[row.rank] = row.last
        group.decide()

    def _step(self, row: Row, written: int, fires: bool, best: int, logits: Tensor) -> int | None:
        """The token to force; None for the likeliest one."""
        reading = row.reading
        if row.is_void:
            return reading.lost
        if row.num_text < 0 and row.group is not None:
            if written == 0:
                return self._first(row, logits)
            row.follow_group(written)
            if row.is_frozen and row.num_text < 0:
                return reading.pad
        if row.num_text < 0 and ((written and row.last in reading.stops) or written >= row.room):
            row.finish(written, reading.end)
        if row.num_text >= 0:
            at = written - row.num_text
            return row.tail[at] if 0 <= at < len(row.tail) else reading.lost
        row.last = best
        row.waits_since = None
        if row.triggers(written, fires):
            row.logits, row.waits_since = tuple(logits.topk(reading.num_candidates).values.tolist()), written
        return None

    def _first(self, row: Row, logits: Tensor) -> int:
        """The candidate that a row of a group begins with. May be called again, where a prompt is read in parts."""
        group = row.group
        assert group is not None
        values, ids = logits.topk(row.reading.num_candidates)
        values, ids = values.tolist(), ids.tolist()
        if row.rank == 0:
            group.expected_firsts = tuple(ids)
        row.logits, row.last = tuple(values), ids[row.rank]
        return row.last
