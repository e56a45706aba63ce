"""Strategies by name: each is a (trigger, selector) pair with its settings; plus the vote over given answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from s2t.config import MANY_SAMPLES, DecodeConfig
from s2t.decode.selectors import LLMSelector, LocalSelector, Selector, TakeoverSelector
from s2t.decode.triggers import Criticality, Divergence, Entropy, Never, Random, SelfCertainty, Trigger
from s2t.errors import ConfigError

DEFAULT_CANDIDATES = 8
_SELECTORS: dict[str, type[Selector]] = {
    "takeover": TakeoverSelector,
    "s2t": LLMSelector,
    "s2t-local": LocalSelector,
}
_ALLOWED_TRIGGERS = {
    "takeover": ("divergence", "entropy", "random", "never"),
    "s2t": ("divergence", "entropy", "random", "never"),
    "s2t-local": ("criticality", "entropy", "random", "never"),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """Filters of `sample`, `self-consistency` and `self-certainty`; see core.sampling."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class Strategy:
    """A trigger with its threshold, what to do when it fires, and how other tokens are chosen."""

    name: str
    trigger: Trigger
    threshold: float = float("inf")
    selector: Selector | None = None
    num_candidates: int = DEFAULT_CANDIDATES
    sampling: Sampling | None = None
    warmup_steps: int = 3
    draft_tokens: int = 0
    """Tokens drafted per LLM forward; 0 adapts to the row's rate of flips, 1 is step by step."""
    seed: int = 0

    @property
    def needs_llm(self) -> bool:
        """True when the LLM is read beside the SLM (the `llm` strategy runs it in the SLM's place instead)."""
        return self.trigger.needs_llm or (self.selector is not None and self.selector.needs_llm)


def build_strategy(
    name: str,
    config: DecodeConfig,
    thresholds: dict[str, float],
    num_candidates: int | None = None,
    seed: int = 0,
) -> Strategy:
    """Make the strategy `name` from settings; `thresholds` (per trigger) come from calibration or the adapter.

    Raises ConfigError when the trigger does not fit the strategy or has no threshold.
    """
    k = config.num_candidates or num_candidates or DEFAULT_CANDIDATES
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.min_p)
    if name not in _SELECTORS:
        is_sampled = name == "sample" or name in MANY_SAMPLES
        trigger = SelfCertainty() if name == "self-certainty" else Never()
        return Strategy(name, trigger, num_candidates=k, sampling=sampling if is_sampled else None, seed=seed)
    trigger = _trigger(name, config)
    return Strategy(
        name,
        trigger,
        _threshold(name, trigger, config, thresholds),
        _SELECTORS[name](),
        k,
        warmup_steps=config.warmup_steps,
        draft_tokens=config.draft_tokens,
        seed=seed,
    )


def _trigger(name: str, config: DecodeConfig) -> Trigger:
    allowed = _ALLOWED_TRIGGERS[name]
    wanted = allowed[0] if config.trigger == "auto" else config.trigger
    if wanted not in allowed:
        raise ConfigError(f"strategy {name} takes trigger {', '.join(allowed)}; got {wanted!r}.")
    if wanted == "divergence":
        return Divergence(config.support_size, config.divergence, config.support)
    return {"never": Never, "random": Random, "entropy": Entropy, "criticality": Criticality}[wanted]()


def _threshold(name: str, trigger: Trigger, config: DecodeConfig, thresholds: dict[str, float]) -> float:
    if trigger.name == "never":
        return float("inf")
    if config.threshold is not None:
        return config.threshold
    if trigger.name in thresholds:
        return thresholds[trigger.name]
    source = "" if trigger.name == "criticality" else " or --calibration calibration.json"
    raise ConfigError(f"strategy {name} with trigger {trigger.name} has no threshold; pass --threshold{source}.")


def vote(answers: Sequence[str | None]) -> str | None:
    """Majority vote over extracted answers; None (no answer found) never wins over an answer, ties go to the earliest."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None
    most = max(counts.values())
    return next(answer for answer in answers if answer is not None and counts[answer] == most)


def choose_sample(strategy: str, answers: Sequence[str | None], certainties: Sequence[float]) -> int:
    """Which of N samples answers for all: the first one of the majority, or the one the model was surest of."""
    if strategy == "self-certainty":
        return max(range(len(answers)), key=lambda i: certainties[i])
    return answers.index(vote(answers))
