"""A method with its settings: which trigger, at which threshold, choosing among how many candidates."""

from __future__ import annotations

from dataclasses import dataclass

from s2t.config import METHODS, TRIGGERS, DecodeConfig, Method
from s2t.errors import ConfigError
from s2t.methods.base import Selector, Trigger, find
from s2t.methods.sample import Sampling
from s2t.methods.triggers import Never

DEFAULT_CANDIDATES = 8


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
        return "llm" in self.needs

    @property
    def needs(self) -> tuple[str, ...]:
        """llm, adapter: what trigger and selector read beside the SLM."""
        return (*self.trigger.needs, *(METHODS[self.name].needs if self.selector is not None else ()))


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
        trigger = find(method.reads)() if method.reads is not None else Never()
        sampling = Sampling(config.temperature, config.top_p, config.top_k, config.min_p) if method.sampling else None
        return Strategy(name, trigger, num_candidates=k, sampling=sampling, seed=seed)
    trigger = _trigger(name, method, config)
    return Strategy(
        name,
        trigger,
        _threshold(name, trigger, config, thresholds),
        find(method.selector)(),
        k,
        warmup_steps=config.warmup_steps,
        draft_tokens=config.draft_tokens,
        seed=seed,
    )


def _trigger(name: str, method: Method, config: DecodeConfig) -> Trigger:
    wanted = method.trigger if config.trigger == "auto" else config.trigger
    found: type[Trigger] = find(TRIGGERS[wanted])
    if not set(found.needs) <= set(method.needs):
        fitting = (trigger for trigger in reversed(TRIGGERS) if set(find(TRIGGERS[trigger]).needs) <= set(method.needs))
        allowed = ", ".join(dict.fromkeys((method.trigger, *fitting)))
        raise ConfigError(f"strategy {name} takes trigger {allowed}; got {wanted!r}.")
    return found.of(config)


def _threshold(name: str, trigger: Trigger, config: DecodeConfig, thresholds: dict[str, float]) -> float:
    if trigger.name == "never":
        return float("inf")
    if config.threshold is not None:
        return config.threshold
    if trigger.name in thresholds:
        return thresholds[trigger.name]
    source = "" if trigger.name == "criticality" else " or --calibration calibration.json"
    raise ConfigError(f"strategy {name} with trigger {trigger.name} has no threshold; pass --threshold{source}.")
