"""What the decoding loop holds: requests, and the rows they live in. Token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


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
    bare_prompt_ids: Sequence[int] | None = field(default=None, kw_only=True)
    """The prompt without its context, for methods that compare the two."""


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
    streams: dict[int, np.ndarray] = field(default_factory=dict)  # uniforms beside `draws`
    held: int = 0  # tokens for which the span goes on that the row is in
    tail: str = ""  # the last characters written
    is_start: bool = True  # whether the next token begins a step of the text
    mixture: list[int] = field(default_factory=list)  # what the fed token's embedding is the mean of
