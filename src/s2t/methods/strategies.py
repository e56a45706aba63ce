"""A method with its settings: which trigger, at which threshold, choosing among how many candidates."""

from __future__ import annotations

from dataclasses import dataclass, field

from s2t.config import CALIBRATED, METHODS, TRIGGERS, DecodeConfig, Method, needs_of
from s2t.errors import ConfigError
from s2t.methods.base import Selector, Trigger, find
from s2t.methods.sample import Sampling
from s2t.methods.triggers import Never

DEFAULT_CANDIDATES = 8
DEFAULT_MIXTURE, DEFAULT_STEP, NO_LIMIT = 3, 64, 2**31


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
    span_tokens: int = 1
    """Tokens for which a place that fires holds, at most."""
    step_end: str | None = None
    """Text that ends a step, and a span with it; None is the session's own choice."""
    mixture: int = 0
    """Samples whose mean embedding a written token is fed as; 0 feeds the token."""
    draft_tokens: int = 0
    """Tokens drafted per LLM forward; 0 adapts to the row's rate of flips, 1 is step by step."""
    seed: int = 0
    needs: tuple[str, ...] = field(init=False)
    """llm, adapter, bare: what trigger and selector read beside the SLM (strategy `llm` runs the LLM in its place)."""
    has_spans: bool = field(init=False)
    """Whether a place that fires holds what follows, so that the loop has to know the text's steps."""

    def __post_init__(self) -> None:
        own = METHODS[self.name].needs if self.selector is not None else ()
        object.__setattr__(self, "needs", (*self.trigger.needs, *own))
        object.__setattr__(self, "has_spans", self.trigger.reads_text or self.span_tokens > 1)

    @property
    def ends_with_steps(self) -> bool:
        """Whether a span is over where the step of the text is."""
        return self.trigger.by_step or not self.trigger.reads_text


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
    method = METHODS[name]
    k = config.num_candidates or num_candidates or DEFAULT_CANDIDATES
    if method.selector is None:
        trigger = find(method.reads).of(config) if method.reads is not None else Never()
        mixture = (config.num_candidates or DEFAULT_MIXTURE) if method.mixes else 0
        return Strategy(name, trigger, num_candidates=k, sampling=_sampling(method, config), mixture=mixture, seed=seed)
    trigger = _trigger(name, method, config)
    own_span = DEFAULT_STEP if trigger.drafts_steps else NO_LIMIT if trigger.by_step else 1
    return Strategy(
        name,
        trigger,
        _threshold(name, trigger, config, thresholds),
        find(method.selector).of(config),
        k,
        _sampling(method, config),
        warmup_steps=config.warmup_steps if trigger.warmup is None else trigger.warmup,
        span_tokens=config.span_tokens or own_span,
        step_end=config.step_end,
        draft_tokens=config.draft_tokens,
        seed=seed,
    )


def _sampling(method: Method, config: DecodeConfig) -> Sampling | None:
    return Sampling(config.temperature, config.top_p, config.top_k, config.min_p) if method.sampling else None


def _trigger(name: str, method: Method, config: DecodeConfig) -> Trigger:
    if not method.takes_triggers:
        if config.trigger != "auto":
            raise ConfigError(f"strategy {name} has a trigger of its own; leave --trigger out, got {config.trigger!r}.")
        return find(method.trigger).of(config)
    needs_of(name, config.trigger)  # raises where the strategy does not take it
    return find(TRIGGERS[method.trigger if config.trigger == "auto" else config.trigger]).of(config)


def _threshold(name: str, trigger: Trigger, config: DecodeConfig, thresholds: dict[str, float]) -> float:
    if trigger.name == "never":
        return float("inf")
    if trigger.name == "always":
        return 0.0
    if config.threshold is not None:
        return config.threshold
    if trigger.name in thresholds:
        return thresholds[trigger.name]
    if trigger.default is not None:
        return trigger.default
    source = " or --calibration calibration.json" if trigger.name in CALIBRATED else ""
    raise ConfigError(f"strategy {name} with trigger {trigger.name} has no threshold; pass --threshold{source}.")
