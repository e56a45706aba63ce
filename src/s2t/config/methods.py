"""The registry: every method and every trigger by name, as plain data, so that settings are checked with no model library loaded.

What the names do stands in `s2t.methods`, where a `module:class` of this page is found. A new trigger is a file there and a line
here; a new selector is the same, as the method that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    is_served: bool = True
    """Whether `s2t serve` offers it."""

    @property
    def takes_triggers(self) -> bool:
        """Whether it can be given another trigger; one that names its own as module:class cannot."""
        return self.selector is not None and ":" not in self.trigger


TRIGGERS = {
    "never": "s2t.methods.triggers:Never",
    "random": "s2t.methods.triggers:Random",
    "entropy": "s2t.methods.triggers:Entropy",
    "divergence": "s2t.methods.triggers:Divergence",
    "criticality": "s2t.methods.triggers:Criticality",
    "router": "s2t.methods.router:Routed",
    "step-score": "s2t.methods.steps:StepScore",
    "step-confidence": "s2t.methods.steps:StepConfidence",
    "step-entropy": "s2t.methods.steps:StepEntropy",
    "call": "s2t.methods.relay:Call",
    "critical": "s2t.methods.critical:Critical",
}
TRIGGER_NEEDS = {"divergence": ("llm",), "step-score": ("llm",), "criticality": ("adapter",)}
"""llm, adapter: what a trigger reads beside the SLM, as its class says."""
_ALWAYS, _TAKEOVER = "s2t.methods.triggers:Always", "s2t.methods.select:Takeover"
_BOTH = ("confidence", "llm")
METHODS = {
    "greedy": Method(),
    "sample": Method(sampling=True),
    "self-consistency": Method(sampling=True, samples=True),
    "self-certainty": Method(sampling=True, samples=True, reads="s2t.methods.sample:SelfCertainty"),
    "llm": Method(needs=("llm",)),
    "takeover": Method("divergence", "s2t.methods.select:Takeover", needs=("llm",)),
    "s2t": Method("divergence", "s2t.methods.select:S2T", needs=("llm",)),
    "s2t-local": Method("criticality", "s2t.methods.select:S2TLocal", needs=("adapter",)),
    "speculative": Method(
        "s2t.methods.speculative:Rejected", "s2t.methods.speculative:Residual", True, needs=("llm",), is_served=False
    ),
    "r2r": Method("s2t.methods.router:Routed", _TAKEOVER, needs=("llm",), is_served=False),
    "specreason": Method("s2t.methods.steps:StepScore", _TAKEOVER, needs=("llm",), is_served=False),
    "smart": Method("s2t.methods.steps:StepConfidence", _TAKEOVER, needs=("llm",), is_served=False),
    "glimprouter": Method("s2t.methods.steps:StepEntropy", _TAKEOVER, needs=("llm",), is_served=False),
    "relay": Method("s2t.methods.relay:Call", _TAKEOVER, needs=("llm",), is_served=False),
    "contrastive": Method(_ALWAYS, "s2t.methods.contrast:Contrastive", needs=("llm",), is_served=False),
    "context-aware": Method(_ALWAYS, "s2t.methods.contrast:ContextAware", needs=("bare",), is_served=False),
    "dola": Method(_ALWAYS, "s2t.methods.contrast:DoLa", is_served=False),
    "released": Method(
        "s2t.methods.triggers:Divergence", "s2t.methods.select:S2TLocal", needs=("llm", "adapter"), is_served=False
    ),
    "local-branch": Method("criticality", "s2t.methods.branch:LocalBranch", needs=("adapter",), is_served=False),
    "multiplex": Method(sampling=True, mixes=True, is_served=False),
    "confidence": Method(reads="s2t.methods.answers:Confidence", is_served=False),
    "forecast": Method(sampling=True, samples=True, reads="s2t.methods.forecast:Forecast", is_served=False),
    "cascade": Method(over=_BOTH, answers="s2t.methods.answers:Cascade", is_served=False),
    "frugalgpt": Method(over=_BOTH, answers="s2t.methods.learned:FrugalGPT", is_served=False),
    "knn-routing": Method(over=_BOTH, answers="s2t.methods.learned:NearestNeighbours", is_served=False),
    "borda": Method(over=("self-certainty",), answers="s2t.methods.votes:Borda", is_served=False),
    "deepconf": Method(over=("self-certainty",), answers="s2t.methods.votes:DeepConf", is_served=False),
    "zip-rc": Method(over=("forecast",), answers="s2t.methods.forecast:ZipRC", is_served=False),
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


def needs_of(name: str, trigger: str = "auto") -> frozenset[str]:
    """llm, adapter, bare: what a strategy, or strategy@trigger, reads beside the SLM; `trigger` is the setting of that name."""
    base, _, own = name.partition("@")
    method = METHODS[base]
    found = own or (trigger if method.takes_triggers and trigger != "auto" else method.trigger)
    return frozenset((*method.needs, *TRIGGER_NEEDS.get(found, ())))
