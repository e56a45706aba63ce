"""What a method is made of: a trigger says where to choose, a selector chooses there, and both look at a `Round`.

The registry of names is `s2t.config.methods`, which loads no model library; `find` gets from its `module:class` to the class.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from s2t.config import DecodeConfig
from s2t.core.rule import fires, winner
from s2t.model.adapter import SelectorReader


class Ahead(NamedTuple):
    """What stands at the ends of branches, K for each of f places: greedy continuations of candidates by the SLM."""

    states: Tensor | None
    """[f, K, H] under the adapter, of the last token; None where they were not asked for."""
    logprobs: Tensor
    """[f, K], the sum of log p_S of the tokens behind each candidate."""
    counts: Tensor
    """[f, K], tokens of each branch, its candidate among them."""


class Round(ABC):
    """One round over n places, each the next token of a row or of its draft: what a trigger or a selector may look at.

    The models' readings beyond the SLM's own are made when they are asked for: the LLM's, and states under the adapter.
    """

    num_written: list[int]
    """Tokens that were written before each place."""
    greedy: list[int]
    tokens: list[int]
    """What each place takes unless a selector chooses: the greedy token, or a sample."""
    hidden: Tensor
    """[n, H], the states that the logits come from."""
    own_logits: Tensor
    """As `logits`, in the model's own dtype: for what compares them, or casts a few rows at a time."""
    num_listed: int | None
    """Likeliest tokens that the LLM's logits are true of; None for all."""

    @property
    @abstractmethod
    def logits(self) -> Tensor:
        """[n, V] of the SLM, float32, reserved ids at -inf."""

    @property
    @abstractmethod
    def keys(self) -> list[str]:
        """The key of each place's request: problem/sample."""

    @property
    @abstractmethod
    def drafts(self) -> list[list[int]]:
        """The places of each row, in order: its next token, and what is drafted behind it."""

    @property
    @abstractmethod
    def held(self) -> list[bool]:
        """Whether the place's row is inside a span, which fires whatever is read."""

    @property
    @abstractmethod
    def starts(self) -> list[bool]:
        """Whether the place begins a step of the text; only for triggers that work step by step."""

    @property
    @abstractmethod
    def draws(self) -> Tensor:
        """A uniform in [0, 1) for each place, the sequence's own; [n]."""

    @property
    @abstractmethod
    def adapter(self) -> SelectorReader:
        """What reads criticality and scores from states; only for methods that need an adapter."""

    @abstractmethod
    def uniforms(self, stream: int) -> Tensor:
        """Another uniform for each place, the sequence's own, independent between streams (1, 2 …) and of `draws`; [n]."""

    @abstractmethod
    def tail(self, place: int) -> str:
        """The last characters of the answer before a place; only for triggers that work on text."""

    @abstractmethod
    def note(self, place: int, numbers: Sequence[float]) -> None:
        """Keep some numbers with the token of a place; a trigger's, beside the one that it reads."""

    @abstractmethod
    def ask(self, rows: Sequence[int], question: str, answers: Sequence[str]) -> Tensor:
        """What the LLM says to a question behind some rows' whole drafts (places in `drafts`), which it then forgets.

        Its logits of the answers, one token each; [r, len(answers)].
        """

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """The SLM's input embeddings of some tokens; [...] -> [..., H]."""

    @abstractmethod
    def layer_logits(self, places: Sequence[int]) -> Tensor:
        """Logits read from the SLM's earlier layers, which the selector named; [L, len(places), V]."""

    @abstractmethod
    def llm_logits(self, places: Sequence[int] | None = None) -> Tensor:
        """The LLM's next-token logits on the SLM's vocabulary, float32, at some places or at all; [len(places), V] or [n, V]."""

    @abstractmethod
    def own_llm_logits(self, places: Sequence[int] | None = None) -> Tensor:
        """The same in the LLM's own dtype."""

    @abstractmethod
    def llm_logprobs(self, places: Sequence[int], ids: Tensor, must_order: bool = False) -> Tensor:
        """log p_L of ids at some places; [f, K] -> [f, K], float32, NaN where an LLM on servers did not tell.

        `must_order` says that the best of each row has to be known.
        """

    @abstractmethod
    def ahead(self, places: Sequence[int], ids: Tensor, depth: int, reads_end: bool) -> Ahead:
        """Branches of `depth` tokens that begin with candidates [f, K] and are then forgotten; of rows that draft nothing."""

    @abstractmethod
    def states(self, places: Sequence[int], ids: Tensor | None = None) -> Tensor:
        """States under the adapter of candidates [f, K] behind some places; [f, K, H].

        Without ids the last token before each place is read once more; [f, 1, H]. This runs the round's one forward: the other
        rows' tokens are accepted first, and nothing else can be asked for afterwards.
        """


class Trigger:
    """Reads one number per place, in a unit of its own, and fires where it passes the threshold."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """llm, adapter: what it reads beside the SLM."""
    is_random: ClassVar[bool] = False
    """Whether it reads the round's `draws`."""
    default: float | None = None
    """Its threshold where none is given; None for one that has to be calibrated."""
    fires_below: ClassVar[bool] = False
    """Whether it fires below its threshold instead of above."""
    warmup: ClassVar[int | None] = None
    """Its own number of first tokens that never trigger; None takes the setting."""
    by_step: ClassVar[bool] = False
    """Whether it works on steps of the text: a place that fires holds the takeover to the step's end."""
    drafts_steps: ClassVar[bool] = False
    """Whether it judges a whole step, which is then drafted to its end."""
    reads_inside: ClassVar[bool] = False
    """Whether it asks for `embed`, which not every engine can answer."""
    reads_text: ClassVar[bool] = False
    """Whether it asks for `starts` or `tail`."""

    @classmethod
    def of(cls, config: DecodeConfig) -> Trigger:
        """The trigger with its settings."""
        return cls()

    def read(self, round: Round) -> Tensor | None:
        """One value per place, [n], or None when nothing is read."""
        return None

    def fires(self, values: Any, threshold: float) -> Any:
        """Where it fires: a tensor of values [n] -> bool [n], or one number -> bool."""
        return values < threshold if self.fires_below else fires(values, threshold)

    def hold(self, value: float) -> int | None:
        """Tokens that a place which fired with this value holds; None takes the strategy's."""
        return None


class Proposal(NamedTuple):
    """The SLM's K candidates at the places that fired, best first, with log p_S."""

    ids: Tensor
    """[f, K]"""
    logprobs: Tensor
    """[f, K]; -inf for what may not be written, when K is near V."""


@dataclass(slots=True)
class Selection:
    """What the places that fired take; `index` is -1 where the token is no candidate (takeover)."""

    token_ids: Tensor  # [f]
    index: Tensor  # [f]
    scores: Tensor | None = None  # [f, K]
    llm_probs: Tensor | None = None  # [f, K]

    @classmethod
    def best(cls, candidates: Proposal, scores: Tensor, llm_probs: Tensor | None = None) -> Selection:
        """The candidate of the highest score, [f, K]; one whose score is not known never wins."""
        index = winner(scores)
        return cls(candidates.ids.gather(-1, index[:, None])[:, 0], index, scores, llm_probs)

    @classmethod
    def of_tokens(cls, candidates: Proposal, token_ids: Tensor, llm_probs: Tensor | None = None) -> Selection:
        """Tokens [f] that need not be candidates."""
        is_candidate = candidates.ids == token_ids[:, None]  # [f, K]
        index = torch.where(is_candidate.any(-1), is_candidate.int().argmax(-1), -1)
        return cls(token_ids, index, llm_probs=llm_probs)


class Selector(ABC):
    """Takes a token where the trigger fired."""

    layers: ClassVar[str] = ""
    """Which earlier layers' logits it reads, low or high; none where it is empty."""
    lookahead: int | None = None
    """Tokens that it reads behind a place before it chooses, where they are more than candidates."""
    reads_states: ClassVar[bool] = False
    """Whether it asks for states under the adapter, which there are of a row's next token alone: nothing is drafted for it."""

    @classmethod
    def of(cls, config: DecodeConfig) -> Selector:
        """The selector with its settings."""
        return cls()

    def check(self, adapter: SelectorReader | None) -> None:
        """Raise ConfigError where it cannot choose beside this adapter."""
        return None

    def lacks(self, num_listed: int) -> str | None:
        """In one line, why an LLM on servers does not suffice, which tells its likeliest tokens alone; None where it does."""
        return None

    @abstractmethod
    def choose(self, round: Round, fired: Sequence[int], candidates: Proposal) -> Selection:
        """Choose for the f places that fired among the candidates of each."""


def find(where: str) -> Any:
    """The class that the registry names as module:class."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
