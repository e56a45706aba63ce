"""S2T-LOCAL inside a server's sampler: what is asked of it (`SelectorSettings`), and how its replies are read (`Told`).

A reply is text, then what the client must know, in reserved ids, which text never holds. `core.insampler` does the work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from s2t.core.rule import score

READING, ROOM, WARMUP, AT, GROUP, ROWS = "s2t", "s2t_room", "s2t_warmup", "s2t_at", "s2t_group", "s2t_rows"
RANKED = "s2t_ranked"
"""Of a row under the adapter (readout `rank`): the step of its group's text whose candidates it ranks."""
VERSION = 3
"""Of what is asked and told; the client and the server have their own copies of this file, and both must agree."""
_FEWEST_DIGITS = 4
MOST_PASSED = 8
"""Triggers that a request passes before it ends to tell of them."""


@dataclass(frozen=True)
class SelectorSettings:
    """How a run reads its selector; equal for all its requests.

    `threshold` is on criticality, None where requests list the steps that trigger. `forbidden` are ranges [start, end) of ids.
    With `ranks` the adapter's logits of the candidates are its reading of them, and `bins` are ids to tell numbers in, no more.
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
    adapter_weight: float = 1.0
    ranks: bool = False
    version: int = VERSION

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
        return self._told[: -4 - len(self.row_marks)]

    @cached_property
    def row_marks(self) -> tuple[int, ...]:
        """Ids that end a request at a trigger and say how many candidates might win: 0, 2, 3 … K; none where ids are too few."""
        count = self.num_candidates
        return self._told[-4 - count : -4] if len(self._told) - 4 - count >= _FEWEST_DIGITS else ()

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
    def marks(self) -> tuple[int, ...]:
        """What the server must stop at."""
        return *self.row_marks, self.trigger, self.end, self.lost

    def fits(self, vocab_size: int) -> bool:
        """Whether all ids are rows of the logits."""
        ids = [*self.bins, *(self.yes_no or ()), *(i for start, end in self.forbidden for i in (start, end - 1))]
        return all(0 <= i < vocab_size for i in ids) and self.num_candidates <= vocab_size

    def to_json(self) -> str:
        """As the server takes it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SelectorSettings:
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

    def opened(self, num_rows: int) -> list[int]:
        """Ids that end a request at a trigger where so many candidates might win, 0 where it is to go on as it is."""
        if self.row_marks:
            return [self.row_marks[max(0, num_rows - 1)]]
        return [*self.spell(num_rows, self.num_candidates), self.trigger]

    def read_opened(self, ids: Sequence[int]) -> tuple[int, Sequence[int]]:
        """How many candidates might win at the trigger that some ids end with, and the ids before; ValueError for none."""
        if ids[-1] in self.row_marks:
            at = self.row_marks.index(ids[-1])
            return at + (at > 0), ids[:-1]
        width = self.width(self.num_candidates)
        return self.number(ids[-1 - width : -1]), ids[: -1 - width]

    def num_extra(self, room: int) -> int:
        """Tokens that a reply may hold behind its text."""
        return MOST_PASSED * self.width(room) + self.width(self.num_candidates) + 1

    def score(self, reading: float, logit: float) -> float:
        """Of a candidate, up to a constant of the step: `reading` is its expected bin, or its logit under the adapter."""
        return score(reading / self.temperature, logit, self.adapter_weight, self.prior_weight)


@lru_cache(maxsize=256)
def _reading(text: str) -> SelectorSettings:
    try:
        found = json.loads(text)
        if found["version"] != VERSION:
            raise ValueError(f"s2t: version {found['version']!r} of what is asked, this server has {VERSION}")
        found["bins"], found["stops"] = tuple(map(_whole, found["bins"])), tuple(map(_whole, found["stops"]))
        found["yes_no"] = tuple(map(_whole, found["yes_no"])) if found["yes_no"] else None
        found["forbidden"] = tuple((_whole(start), _whole(end)) for start, end in found["forbidden"])
        found["num_candidates"] = _whole(found["num_candidates"])
        for name in ("temperature", "prior_weight", "scale", "adapter_weight"):
            found[name] = _finite(found[name])
        if type(found["ranks"]) is not bool:
            raise TypeError(f"{found['ranks']!r} is not true or false")
        found["threshold"] = None if found["threshold"] is None else _finite(found["threshold"])
        if found["temperature"] <= 0 or found["scale"] <= 0:
            raise ValueError("s2t: temperature and scale must be above 0")
        return SelectorSettings(**found)
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"s2t: no reading of a selector: {error}") from error


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _finite(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise TypeError(f"{value!r} is no number")
    return float(value)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _index(reading: SelectorSettings, name: str, device: torch.device) -> Tensor:
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
    """Where it ended at a trigger: how many candidates, best first, might win. The greedy one is the text's last token.

    Of a row under the adapter (readout `rank`): which candidate won, the second being 2, and the text is that candidate; 0,
    and no text, where the greedy one won.
    """


def read(ids: Sequence[int], reading: SelectorSettings, room: int) -> Told:
    """What the plug-in told; a reply that does not end with one of its marks, or is garbled, counts as lost."""
    reserved = frozenset(reading._told)
    size = next((i for i, token in enumerate(ids) if token in reserved), len(ids))
    text, tail = list(ids[:size]), [i for i in ids[size:] if i != reading.pad]
    lost = Told(text, frozenset(), True)
    if not tail or tail[-1] not in reading.marks or tail[-1] == reading.lost:
        return lost
    try:
        rows, numbers = (0, tail[:-1]) if tail[-1] == reading.end else reading.read_opened(tail)
        width = reading.width(room)
        passed = frozenset(reading.number(numbers[at : at + width]) for at in range(0, len(numbers), width))
    except ValueError:
        return lost
    if any(place >= size for place in passed) or (rows and not text):
        return lost
    return Told(text, passed, num_rows=rows)
