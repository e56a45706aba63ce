"""S2T-LOCAL inside a server's sampler: what a logits processor does at every token.

It sees each step's logits before they are sampled and can force a token. That is enough to end a request at a trigger, to
pass the triggers that no other candidate could win, and to choose between the candidates where one could: as rows of a
group, each of which begins with one candidate, and of which the winner goes on. Under readout `rank` a request writes
through its triggers and the candidates of each are kept, for a row under the adapter, on the same prefix, to rank.
`core.onserver` is how a client asks and reads. Knows no server; `integrations.vllm` plugs it in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from s2t.core.onserver import AT, GROUP, MOST_PASSED, RANKED, READING, ROOM, ROWS, WARMUP, SelectorSettings
from s2t.core.rule import criticality, expected_bin, finish_reason, fires, winner
from s2t.core.support import argmax_first, best_ids

_LONGEST_WAIT = 64  # steps that a row waits for the others of its group
_MOST_NAMES = 4096
_MARGIN = 1e-5  # a candidate that could come so close to the greedy one is looked at
_NEVER = float("-inf")

Place = tuple[int, "SelectingRequest", int]
"""Index into the batch, the row's state, tokens written."""
Kept = dict[int, tuple[Sequence[int], tuple[float, ...]]]
"""Candidates of the steps of one text, best first, with their logits."""
T = TypeVar("T")


@dataclass(slots=True)
class Group:
    """Rows that begin with the candidates of one step; `winner` once all have been scored, -1 where none can be named."""

    num_rows: int
    reading: SelectorSettings
    joined: int = 0
    scores: dict[int, float] = field(default_factory=dict)
    firsts: dict[int, int] = field(default_factory=dict)
    expected_firsts: tuple[int, ...] = ()
    winner: int | None = None

    def enter(self, row: SelectingRequest, expected: float) -> None:
        """A row's candidate has been scored; name the winner if everything is there."""
        self.scores[row.rank] = row.reading.score(expected, row.logits[row.rank])
        self.firsts[row.rank] = row.last
        if self.winner is not None or len(self.scores) < self.num_rows:
            return
        same = all(self.expected_firsts[rank] == first for rank, first in self.firsts.items())
        best = winner(self.scores[rank] for rank in range(self.num_rows))
        self.winner = best if same else -1


@dataclass(slots=True)
class SelectingRequest:
    """One request that asks for selection, from its first token to its last mark."""

    reading: SelectorSettings
    room: int
    warmup: int
    at: frozenset[int]
    group: Group | None = None
    rank: int = 0
    kept: Kept | None = None  # readout `rank`: where the candidates of its triggers go
    candidates: Sequence[int] = ()  # those that this row ranks, under the adapter
    is_void: bool = False
    last: int = -1  # the token that was written before
    logits: tuple[float, ...] = ()  # of the K candidates at the step last looked at, best first
    waits_since: int | None = None  # place of a trigger whose greedy token has been written and is scored now
    passed: list[int] = field(default_factory=list)
    num_text: int = -1  # tokens of text, once it is complete
    tail: list[int] = field(default_factory=list)
    is_frozen: bool = False

    @classmethod
    def of(cls, args: Mapping[str, Any], groups: Names[Group], texts: Names[Kept], written: int) -> SelectingRequest:
        """From a request's extra arguments; one that has written already was interrupted, and holds nothing."""
        try:
            numbers = (
                int(args[ROOM]),
                int(args.get(WARMUP, 0)),
                int(args.get(ROWS, 1)),
                frozenset(map(int, args.get(AT, ()))),
                int(args.get(RANKED, 0)),
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"s2t: {type(error).__name__} {error}") from error
        reading, (room, warmup, rows, at, place) = SelectorSettings.from_json(str(args[READING])), numbers
        row = cls(reading, room, warmup, at)
        if row.room < 1 or not 1 <= rows <= reading.num_candidates:
            raise ValueError(f"s2t: {row.room} tokens and {rows} candidates cannot be asked for")
        if reading.ranks and GROUP not in args:
            raise ValueError("s2t: candidates are kept under a name, and there is none")
        row.is_void = written > 0
        if GROUP in args and not row.is_void:
            name = str(args[GROUP])
            if reading.ranks:
                row._share(name, place if RANKED in args else None, texts)
            else:
                row._join(name, rows, groups)
        return row

    def _join(self, name: str, num_rows: int, groups: Names[Group]) -> None:
        """Become one of the rows that begin with the candidates of one step."""
        group = groups.get(name)
        if (
            group is None
            or group.joined == group.num_rows
            or (group.num_rows, group.reading) != (num_rows, self.reading)
        ):
            group = groups.add(name, Group(num_rows, self.reading))
        self.group, self.rank = group, group.joined
        group.joined += 1

    def _share(self, name: str, ranked: int | None, texts: Names[Kept]) -> None:
        """Keep the candidates of a text's triggers, or rank those of one step; this row is void where they are not known."""
        text = texts[name] if name in texts else texts.add(name, {})
        if ranked is None:
            self.kept = text
        else:
            self.candidates, self.logits = text.get(ranked, ((), ()))
            self.is_void = not self.candidates

    def needs_bins(self, written: int) -> bool:
        """Whether the token before is a candidate to score."""
        return self.num_text < 0 and (self.waits_since is not None or (self.group is not None and written == 1))

    def forget(self, written: int) -> None:
        """Undo what was seen at this very step before: that was a part of a prompt."""
        if self.waits_since is not None and self.waits_since >= written:
            self.waits_since = None
        if self.reading.ranks:
            while self.passed and self.passed[-1] >= written:
                self.passed.pop()
            if written == 0:
                self.num_text = -1

    def triggers(self, written: int, fired: bool) -> bool:
        """Whether the step that comes is one where candidates are looked at."""
        return written >= self.warmup and (fired if self.reading.threshold is not None else written in self.at)

    def finish(self, written: int, *marks: int) -> None:
        """The text is complete; the passed triggers and some marks follow."""
        told = [digit for place in self.passed for digit in self.reading.spell(place, self.room)]
        self.num_text, self.tail = written, [*told, *marks]

    def settle(self, expected: float) -> None:
        """The greedy token of a trigger has been scored: go on with it, or end where another candidate might win."""
        assert self.waits_since is not None
        written = self.waits_since + 1
        reading, (greedy, *others) = self.reading, self.logits
        best = reading.score(expected, greedy) - _MARGIN
        rows = 1 + sum(other > _NEVER and reading.score(1.0, other) > best for other in others)
        if rows > 1:
            self.finish(written, *reading.opened(rows))
        else:
            self.pass_by(self.waits_since)
        self.waits_since = None

    def pass_by(self, place: int) -> None:
        """Go on behind the greedy token of a trigger, of which the client is told at the end."""
        self.passed.append(place)
        if len(self.passed) == MOST_PASSED:
            self.finish(place + 1, *self.reading.opened(0))

    def note(self, written: int, candidates: list[int], logits: list[float]) -> None:
        """Keep the candidates of a trigger, best first."""
        self.logits = tuple(logits)
        if not self.reading.ranks:
            self.waits_since = written
        elif self.kept is not None:
            self.kept[written] = candidates, self.logits
            self.pass_by(written)

    def choose(self, readings: Sequence[float]) -> int:
        """The token that a row under the adapter begins with, by its logits of the kept candidates: the winner, or a mark."""
        scores = [self.reading.score(own, logit) for own, logit in zip(readings, self.logits, strict=True)]
        best = winner(scores)
        self.finish(min(best, 1), *(self.reading.opened(best + 1) if best else [self.reading.end]))
        return self.candidates[best] if best else self.reading.end

    def follow_group(self, written: int) -> None:
        """Behind its first token: go on as the winner, end as a loser, or wait."""
        group, reading = self.group, self.reading
        assert group is not None
        if group.winner is None and written <= _LONGEST_WAIT:
            self.is_frozen = True
        elif group.winner != self.rank:
            self.num_text, self.tail = written, [reading.lost]
        elif self.is_frozen:  # what it wrote while waiting is no text
            self.num_text, self.tail = written, reading.opened(0)
        else:
            self.group = None

    def is_first(self, written: int) -> bool:
        """Whether the candidate comes that a row of a group begins with; again and again where a prompt is read in parts."""
        return self.group is not None and written == 0

    def begin(self, candidates: Sequence[int]) -> int:
        """The candidate that a row of a group begins with."""
        assert self.group is not None
        if self.rank == 0:
            self.group.expected_firsts = tuple(candidates)
        self.last = candidates[self.rank]
        return self.last

    def next(self, written: int) -> int | None:
        """The token to force at the step that comes; None where the likeliest one, or the first of a group's row, is due."""
        if self.num_text < 0 and not self.is_void and self.group is None:  # as most rows are at most steps
            if not self._is_over(written):
                return None
            self.finish(written, self.reading.end)
        return self._next(written)

    def _is_over(self, written: int) -> bool:
        return finish_reason(written > 0 and self.last in self.reading.stops, written, self.room) is not None

    def _next(self, written: int) -> int | None:
        reading = self.reading
        if self.is_void:
            return reading.lost
        if self.num_text < 0 and self.group is not None:
            if written == 0:
                return None
            self.follow_group(written)
            if self.is_frozen and self.num_text < 0:
                return reading.pad
        if self.num_text < 0 and self._is_over(written):
            self.finish(written, reading.end)
        if self.num_text < 0:
            return None
        at = written - self.num_text
        return self.tail[at] if 0 <= at < len(self.tail) else reading.lost


class Names(OrderedDict[str, T]):
    """What requests share by a name; the oldest are dropped."""

    def add(self, name: str, value: T) -> T:
        """Keep a value under a name, and return it."""
        self[name] = value
        while len(self) > _MOST_NAMES:
            self.popitem(last=False)
        return value


class Plugin:
    """The logits processor's work, with no server around it: `apply` at every step, rows in the caller's keeping."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.groups: Names[Group] = Names()
        self.texts: Names[Kept] = Names()

    def new_row(self, args: Mapping[str, Any] | None, written: int = 0) -> SelectingRequest | None:
        """The state of a request; None for one that does not ask, or asks for ids that are none."""
        if not args or READING not in args or not SelectorSettings.from_json(str(args[READING])).fits(self.vocab_size):
            return None
        return SelectingRequest.of(args, self.groups, self.texts, written)

    @torch.inference_mode()
    def apply(self, logits: Tensor, places: Sequence[Place], knows_last: bool = False) -> Tensor:
        """Mask, watch and force: logits [B, V] in place; `places` are those that ask.

        With `knows_last` the caller has set every row's `last`; else it is taken from the logits.
        """
        readings: dict[int, list[Place]] = {}
        for place in places:
            readings.setdefault(id(place[1].reading), []).append(place)
        for members in readings.values():
            self._apply(logits, members, knows_last)
        return logits

    def _apply(self, logits: Tensor, members: list[Place], knows_last: bool) -> None:
        reading = members[0][1].reading
        for _, row, written in members:
            row.is_void |= written > 0 and row.last < 0  # it was interrupted, and what it was is gone
            row.forget(written)
        fired = _fired(logits, reading)
        expected = _expected(logits, members, reading)
        _mask(logits, [i for i, _, _ in members], reading)
        for row, value in expected:  # groups are decided before their rows go on
            if row.group is not None:
                row.group.enter(row, value)
            else:
                row.settle(value)
        forced: dict[int, int] = {}
        looked_at: list[Place] = []
        ranking: list[tuple[int, SelectingRequest]] = []
        for place in members:
            i, row, written = place
            if (token := row.next(written)) is not None:
                forced[i] = token
            elif row.candidates:
                ranking.append((i, row))
            elif row.is_first(written) or row.triggers(written, i in fired):
                looked_at.append(place)
        if not knows_last:
            _note_likeliest(logits, members)
        if looked_at:
            forced |= _look_at(logits, looked_at, reading.num_candidates)
        if ranking:
            forced |= _rank(logits, ranking)
        if forced:
            _force(logits, forced)


def _fired(logits: Tensor, reading: SelectorSettings) -> frozenset[int]:
    """Rows of the batch whose criticality is above the threshold."""
    if reading.threshold is None or reading.yes_no is None:
        return frozenset()
    pairs = logits.index_select(1, reading.tensor("yes_no", logits.device)).float()  # [B, 2]
    values = criticality(pairs[:, 0] - pairs[:, 1], reading.scale)
    return frozenset(fires(values, reading.threshold).nonzero()[:, 0].tolist())


def _expected(
    logits: Tensor, members: Sequence[Place], reading: SelectorSettings
) -> list[tuple[SelectingRequest, float]]:
    """Expected bin of the tokens before, where they are candidates."""
    asked = [(i, row) for i, row, written in members if not row.is_void and row.needs_bins(written)]
    if not asked:
        return []
    rows = torch.tensor([i for i, _ in asked], device=logits.device)
    bins = logits[rows][:, reading.tensor("bins", logits.device)]  # [n, R]
    values = expected_bin(bins, reading.scale).tolist()
    return [(row, value) for (_, row), value in zip(asked, values, strict=True)]


def _mask(logits: Tensor, rows: Sequence[int], reading: SelectorSettings) -> None:
    """Forbid reserved ids to some rows of the batch."""
    if len(rows) == logits.shape[0]:
        for start, end in reading.forbidden:
            logits[:, start:end] = _NEVER
    else:
        index = torch.tensor(rows, device=logits.device)
        logits[index[:, None], reading.tensor("forbidden", logits.device)] = _NEVER


def _note_likeliest(logits: Tensor, members: Sequence[Place]) -> None:
    """Let rows know what they are about to write, where nothing is forced."""
    rows = [i for i, _, _ in members]
    every = len(rows) == logits.shape[0]
    best = best_ids(logits if every else logits[torch.tensor(rows, device=logits.device)]).tolist()
    for at, (i, row, _) in enumerate(members):
        row.last = best[i if every else at]


def _look_at(logits: Tensor, places: Sequence[Place], num_candidates: int) -> dict[int, int]:
    """Note the candidates' logits of some rows; returns what those that begin a group's row are forced to."""
    index = torch.tensor([i for i, _, _ in places], device=logits.device)
    looked_at = logits[index]
    values, ids = looked_at.topk(num_candidates)
    ids = argmax_first(ids, best_ids(looked_at)[:, None])
    forced = {}
    for (i, row, written), best, candidates in zip(places, values.tolist(), ids.tolist(), strict=True):
        if row.is_first(written):
            row.logits = tuple(best)
            forced[i] = row.begin(candidates)
        else:
            row.note(written, candidates, best)
    return forced


def _rank(logits: Tensor, rows: Sequence[tuple[int, SelectingRequest]]) -> dict[int, int]:
    """What rows under the adapter are forced to: the winners among the candidates that were kept for them."""
    index = torch.tensor([i for i, _ in rows], device=logits.device)
    ids = torch.tensor([row.candidates for _, row in rows], device=logits.device)
    readings = logits[index[:, None], ids].tolist()
    return {i: row.choose(own) for (i, row), own in zip(rows, readings, strict=True)}


def _force(logits: Tensor, forced: Mapping[int, int]) -> None:
    rows, tokens = (torch.tensor(list(part), device=logits.device) for part in (forced.keys(), forced.values()))
    logits[rows] = _NEVER
    logits[rows, tokens] = 0.0
