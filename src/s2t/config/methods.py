"""The registry: every method and every trigger by name, as plain data, so that settings are checked with no model library loaded.

What the names do stands in `s2t.methods`, where a `module:class` of this page is found. A new trigger is a file there and a line
here; a new selector is the same, as the method that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

from s2t.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Method:
    """How an answer is written: what triggers, what a triggered step takes, and how all other tokens are chosen."""

    trigger: str = "never"
    """The trigger it has unless told otherwise; it takes every other one that needs no more than it does."""
    selector: str | None = None
    """What a triggered step takes, as module:class."""
    sampling: bool = False
    """Whether other tokens are sampled; else they are the greedy ones."""
    samples: bool = False
    """Whether several samples are written, of which one answers for all."""
    reads: str | None = None
    """Something that is read at every step and never fires, as module:class, in the place of a trigger."""
    needs: tuple[str, ...] = ()
    """llm, adapter, bare (the prompt without its context)."""
    mixes: bool = False
    """Whether a written token is fed as the mean embedding of K samples."""
    over: tuple[str, ...] = ()
    """Of a method that only chooses among answers of finished runs: whose answers."""
    answers: str | None = None
    """How it chooses among them, as module:class."""
    is_served: bool = False
    """Whether `s2t serve` offers it."""

    @property
    def takes_triggers(self) -> bool:
        """Whether it can be given another trigger; one that names its own as module:class cannot."""
        return self.selector is not None and ":" not in self.trigger


TRIGGERS = {
    "never": "s2t.methods.triggers:Never",
    "random": "s2t.methods.triggers:Random",
    "entropy": "s2t.methods.triggers:Entropy",
    "divergence": "s2t.methods.select:Divergence",
    "criticality": "s2t.methods.select:Criticality",
    "router": "s2t.methods.router:Routed",
    "step-score": "s2t.methods.steps:StepScore",
    "step-confidence": "s2t.methods.steps:StepConfidence",
    "step-entropy": "s2t.methods.steps:StepEntropy",
    "call": "s2t.methods.relay:Call",
    "critical": "s2t.methods.critical:Critical",
}
TRIGGER_NEEDS = {"divergence": ("llm",), "step-score": ("llm",), "criticality": ("adapter",)}
"""llm, adapter: what a trigger reads beside the SLM, as its class says."""
CALIBRATED = ("divergence", "entropy", "random")
"""Triggers whose thresholds `s2t calibrate` finds."""
_ALWAYS, _TAKEOVER = "s2t.methods.triggers:Always", "s2t.methods.select:Takeover"
_BOTH = ("confidence", "llm")
METHODS = {
    "greedy": Method(is_served=True),
    "sample": Method(sampling=True, is_served=True),
    "self-consistency": Method(sampling=True, samples=True, is_served=True),
    "self-certainty": Method(sampling=True, samples=True, reads="s2t.methods.sample:SelfCertainty", is_served=True),
    "llm": Method(needs=("llm",), is_served=True),
    "takeover": Method("divergence", "s2t.methods.select:Takeover", needs=("llm",), is_served=True),
    "s2t": Method("divergence", "s2t.methods.select:S2T", needs=("llm",), is_served=True),
    "s2t-local": Method("criticality", "s2t.methods.select:S2TLocal", needs=("adapter",), is_served=True),
    "speculative": Method("s2t.methods.speculative:Rejected", "s2t.methods.speculative:Residual", True, needs=("llm",)),
    "r2r": Method("s2t.methods.router:Routed", _TAKEOVER, needs=("llm",)),
    "specreason": Method("s2t.methods.steps:StepScore", _TAKEOVER, needs=("llm",)),
    "smart": Method("s2t.methods.steps:StepConfidence", _TAKEOVER, needs=("llm",)),
    "glimprouter": Method("s2t.methods.steps:StepEntropy", _TAKEOVER, needs=("llm",)),
    "relay": Method("s2t.methods.relay:Call", _TAKEOVER, needs=("llm",)),
    "contrastive": Method(_ALWAYS, "s2t.methods.contrast:Contrastive", needs=("llm",)),
    "context-aware": Method(_ALWAYS, "s2t.methods.contrast:ContextAware", needs=("bare",)),
    "dola": Method(_ALWAYS, "s2t.methods.contrast:DoLa"),
    "released": Method("s2t.methods.select:Divergence", "s2t.methods.select:S2TLocal", needs=("llm", "adapter")),
    "local-branch": Method("criticality", "s2t.methods.branch:LocalBranch", needs=("adapter",)),
    "multiplex": Method(sampling=True, mixes=True),
    "confidence": Method(reads="s2t.methods.answers:Confidence"),
    "forecast": Method(sampling=True, samples=True, reads="s2t.methods.forecast:Forecast"),
    "cascade": Method(over=_BOTH, answers="s2t.methods.answers:Cascade"),
    "frugalgpt": Method(over=_BOTH, answers="s2t.methods.learned:FrugalGPT"),
    "knn-routing": Method(over=_BOTH, answers="s2t.methods.learned:NearestNeighbours"),
    "borda": Method(over=("self-certainty",), answers="s2t.methods.votes:Borda"),
    "deepconf": Method(over=("self-certainty",), answers="s2t.methods.votes:DeepConf"),
    "zip-rc": Method(over=("forecast",), answers="s2t.methods.forecast:ZipRC"),
}

STRATEGIES = tuple(METHODS)
MANY_SAMPLES = tuple(name for name, method in METHODS.items() if method.samples)
SAMPLED = tuple(name for name, method in METHODS.items() if method.sampling)
TRIGGERED = tuple(name for name, method in METHODS.items() if method.takes_triggers)
OVER_ANSWERS = tuple(name for name, method in METHODS.items() if method.answers is not None)
WRITERS = tuple(name for name in METHODS if name not in OVER_ANSWERS)
SERVED = tuple(name for name, method in METHODS.items() if method.is_served)
NEEDS_LLM = frozenset(name for name, method in METHODS.items() if "llm" in method.needs)
NEEDS_ADAPTER = frozenset(name for name, method in METHODS.items() if "adapter" in method.needs)


def unit_of(name: str, trigger: str = "auto") -> str | None:
    """What the threshold of a strategy, or strategy@trigger, is of: a trigger's reading, or one of its own; None without any."""
    base, _, own = name.partition("@")
    method = METHODS[base]
    if method.takes_triggers:
        return own or (method.trigger if trigger == "auto" else trigger)
    return base if method.selector is not None or method.answers is not None else None


def needs_of(name: str, trigger: str = "auto") -> frozenset[str]:
    """llm, adapter, bare: what a strategy, or strategy@trigger, reads beside the SLM; `trigger` is the setting of that name.

    Raises ConfigError where the strategy does not take the trigger: one that needs an LLM, say, for a method that has none.
    """
    base, _, own = name.partition("@")
    method = METHODS[base]
    found = own or (trigger if method.takes_triggers and trigger != "auto" else method.trigger)
    can_read = {*method.needs, "adapter"}
    if method.takes_triggers and not can_read.issuperset(TRIGGER_NEEDS.get(found, ())):
        fitting = (name for name in reversed(TRIGGERS) if can_read.issuperset(TRIGGER_NEEDS.get(name, ())))
        allowed = ", ".join(dict.fromkeys((method.trigger, *fitting)))
        raise ConfigError(f"strategy {base} takes trigger {allowed}; got {found!r}.")
    return frozenset((*method.needs, *TRIGGER_NEEDS.get(found, ())))
