"""What the decoding loop holds and leaves: requests, the rows they live in, and the sequences they become. Token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from s2t.records import Cost, Step


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


@dataclass(slots=True)
class Generated:
    """One finished sequence; `steps` is filled only when asked for."""

    token_ids: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    finish_reason: str = ""
    num_triggered: int = 0
    num_flips: int = 0
    notes: list[tuple[float, ...]] = field(default_factory=list)
    """What the trigger noted, in order."""
    last_value: float | None = None
    """Its reading at the last token."""
    value: float = 0.0
    """Sum of the trigger's readings over the steps."""

    @property
    def mean_value(self) -> float:
        """The trigger's mean reading over the sequence, in its own unit."""
        return self.value / max(len(self.token_ids), 1)

    def add(self, step: Step, keep: bool) -> None:
        """Take the next step; `keep` it whole as well."""
        self.token_ids.append(step.token_id)
        self.num_triggered += step.fired
        self.num_flips += step.flip and step.fired
        self.value += step.value or 0.0
        self.last_value = step.value
        if step.notes is not None:
            self.notes.append(step.notes)
        if keep:
            self.steps.append(step)
        if step.finish_reason is not None:
            self.finish_reason = step.finish_reason
