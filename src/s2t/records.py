"""Records passed between floors; plain data, no models, no files, no behaviour beyond views of themselves. All are frozen but
`Generated`, which grows by steps.

Everything the loop, the workflows and the report exchange is one of these, so each floor can be read
and tested without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer; `template` groups problems that share their wording, if known."""

    problem_id: str
    task: str
    split: str
    question: str
    answer: str
    template: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # JSON values only; a grader may need them


@dataclass(frozen=True, slots=True)
class Grade:
    """Outcome of grading one text: whether it is right and the answer that was read from it (None: none found)."""

    is_correct: bool
    extracted: str | None


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

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of its prompt, in those of the model that has more of them."""
        return max(len(self.prompt_ids), len(self.llm_prompt_ids or ()))


@dataclass(frozen=True, slots=True)
class Candidates:
    """The SLM's most likely next tokens, best first; `logprobs` are over its whole (masked) vocabulary, nats."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def greedy_id(self) -> int:
        return self.ids[0]


@dataclass(frozen=True, slots=True)
class Step:
    """One accepted token of one sequence: all that measuring, collecting, tracing and serving need.

    `value` is the trigger's own reading in its own unit (nats, probability; None when the trigger reads
    nothing). `candidates`, `scores` and `llm_probs` are kept where the step triggered, or everywhere when
    the loop is asked for a trace; `scores` and `llm_probs` are aligned with `candidates.ids`; what an LLM on
    servers did not tell is None.
    `finish_reason` is None until the last step of the sequence, then "stop" or "length".
    """

    request: int
    index: int
    token_id: int
    greedy_id: int
    fired: bool = False
    value: float | None = None
    candidates: Candidates | None = None
    selected_index: int | None = None
    scores: tuple[float | None, ...] | None = None
    llm_probs: tuple[float | None, ...] | None = None
    llm_top_id: int | None = None
    notes: tuple[float, ...] | None = None  # what the trigger read beside its value, if it keeps anything
    finish_reason: str | None = None

    @property
    def flip(self) -> bool:
        """True when the accepted token differs from the SLM's greedy token."""
        return self.token_id != self.greedy_id


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one sequence (or a sum of many), both models; a batch of B rows counts B forwards, a prefill 1.

    `generated` is the number of accepted tokens. `*_processed` counts every token run through the model:
    prompt, generated and candidate tokens alike. `*_flops` is 2 x active parameters x processed tokens
    plus the attention term 4 x layers x width x (tokens attended).
    """

    generated: int = 0
    slm_forwards: int = 0
    llm_forwards: int = 0
    slm_processed: int = 0
    llm_processed: int = 0
    slm_flops: float = 0.0
    llm_flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.generated + other.generated,
            self.slm_forwards + other.slm_forwards,
            self.llm_forwards + other.llm_forwards,
            self.slm_processed + other.slm_processed,
            self.llm_processed + other.llm_processed,
            self.slm_flops + other.slm_flops,
            self.llm_flops + other.llm_flops,
        )


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


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a trajectory came from; enough to regenerate it."""

    task: str
    split: str
    problem_id: str
    template: str | None
    policy: str
    pair: str
    seed: int


@dataclass(frozen=True, slots=True)
class SelectionGroup:
    """One training example of the selector: a prefix and the SLM's candidates with the LLM's absolute probabilities."""

    prefix_ids: tuple[int, ...]
    candidate_ids: tuple[int, ...]
    slm_logprobs: tuple[float, ...]
    llm_probs: tuple[float, ...]
    divergence: float
    is_triggered: bool
    step: int
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Result:
    """One problem answered by one strategy, graded; the line format of results.jsonl."""

    problem_id: str
    template: str | None
    strategy: str
    is_correct: bool
    extracted: str | None
    gold: str
    text: str
    cost: Cost
    num_triggered: int
    num_flips: int
    finish_reason: str
    num_samples: int = 1
    num_correct_samples: int | None = None  # self-consistency: right answers among the N, for pass@N
    seed: int = 0
    samples: list[dict[str, Any]] | None = (
        None  # self-consistency: answer, is_correct, certainty, tokens of each of the N; for zip-rc its forecasts
    )
    value: float | None = None  # mean of what a method reads at every step, such as confidence
