"""Choice of reserved (never-used) vocabulary ids, one table keyed by how a tokenizer family names its spare tokens.

Families without spare tokens (Qwen, Phi-3) have padding rows instead. Returned ids are masked out of generation; where a
tokenizer has too few spare tokens, rows past its last id are taken, and where the embedding has none either, rows that a
merge would add.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from s2t.errors import ModelError

SPARE_TOKENS = (
    ("embedded pair", re.compile(r"<\|reserved_(\d+)\|>")),
    ("gemma", re.compile(r"<unused(\d+)>")),
    ("llama-3", re.compile(r"<\|reserved_special_token_(\d+)\|>")),
    ("mistral", re.compile(r"\[control_(\d+)\]")),
    ("mistral-tekken", re.compile(r"<SPECIAL_(\d+)>")),
    ("phi", re.compile(r"<\|dummy_(\d+)\|>")),
    ("falcon", re.compile(r">>UNUSED_(\d+)<<")),
    ("deepseek", re.compile(r"<｜place▁holder▁no▁(\d+)｜>")),
)


SPARE_TOKEN = re.compile("|".join(pattern.pattern.replace("(", "(?:") for _, pattern in SPARE_TOKENS))
"""Found in a text where any of them is; which ones, one pattern after the other says, since spellings may overlap."""


@dataclass(frozen=True, slots=True)
class ReservedIds:
    """R bin ids and two criticality ids (yes, no); `kind` says where they come from."""

    bins: tuple[int, ...]
    criticality: tuple[int, int]
    kind: str
    all: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "all", (*self.bins, *self.criticality))


def choose_reserved_ids(vocab: dict[str, int], num_rows: int, num_bins: int) -> ReservedIds:
    """Pick num_bins + 2 ids from a tokenizer's vocabulary and an embedding of `num_rows` rows.

    Order of preference: the family's spare tokens, then padding rows past the last token, then added rows.
    """
    needed = num_bins + 2
    for family, pattern in SPARE_TOKENS:
        spare = sorted((int(match[1]), i) for token, i in vocab.items() if (match := pattern.fullmatch(token)))
        if len(spare) >= needed:
            return _split([i for _, i in spare[-needed:]], f"{family} spare tokens")
    first = max(vocab.values()) + 1
    if num_rows - first >= needed:
        return _split(list(range(num_rows - needed, num_rows)), "padding rows")
    return _split(list(range(max(num_rows, first), max(num_rows, first) + needed)), "added rows")


def spare_tokens_in(text: str) -> frozenset[str]:
    """Every spelling of a spare token, of any family, that a text holds."""
    return frozenset(match[0] for _, pattern in SPARE_TOKENS for match in pattern.finditer(text))


def _split(ids: list[int], kind: str) -> ReservedIds:
    if len(set(ids)) != len(ids):
        raise ModelError("reserved ids are not distinct; the tokenizer maps two spare tokens to one id.")
    return ReservedIds(tuple(ids[:-2]), (ids[-2], ids[-1]), kind)
