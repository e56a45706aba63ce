"""What the decoding loop holds: requests, the rows they live in, and one round's places and choices. Token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to write: prompt ids, and the key its random numbers depend on (with the strategy's seed).

    `llm_prompt_ids` is the prompt in the LLM's own tokens, where these are others than the SLM's; `max_new_tokens` a length
    limit of its own.
    """

    index: int
    prompt_ids: Sequence[int]
    key: str = ""
    llm_prompt_ids: Sequence[int] | None = None
    max_new_tokens: int | None = None


@dataclass(slots=True, eq=False)
class Row:
    """One sequence in its slot: either ready (the state of its next token is known), or with tokens to feed."""

    request: Request
    slot: int
    feed: list[int]
    draws: np.ndarray
    limit: int  # of steps
    steps: int = 0
    flips: int = 0
    is_ready: bool = False
    is_finished: bool = False
    last: int = -1  # the last token of prompt and answer so far
    twin: Row | None = None  # a row that reads the same prompt in the same forward


@dataclass(slots=True)
class Places:
    """The steps of one round, depth by depth: n places, each the next token of a row or of its draft."""

    rows: list[Row]
    offsets: list[int]
    hidden: Tensor  # [n, H]
    logits: Tensor  # [n, V]
    greedy: list[int]
    tokens: list[int]  # greedy, or sampled
    of_row: dict[Row, list[int]] = field(default_factory=dict)  # a row's places, in order

    def draft(self, row: Row) -> list[int]:
        return [self.tokens[place] for place in self.of_row[row]]


@dataclass(slots=True)
class Choice:
    """What trigger and selector said of one round's places."""

    values: list[float] | None
    fired: list[int]  # places
    candidate_ids: Tensor | None = None  # [f, K]
    logprobs: Tensor | None = None  # [f, K]
    chosen: dict[int, int] = field(default_factory=dict)  # place -> token, once selected
    details: dict[int, dict] = field(default_factory=dict)  # place -> fields of its Step
