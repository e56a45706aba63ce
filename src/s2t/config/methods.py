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
    """llm, adapter."""


TRIGGERS = {
    "never": "s2t.methods.triggers:Never",
    "random": "s2t.methods.triggers:Random",
    "entropy": "s2t.methods.triggers:Entropy",
    "divergence": "s2t.methods.triggers:Divergence",
    "criticality": "s2t.methods.triggers:Criticality",
}
METHODS = {
    "greedy": Method(),
    "sample": Method(sampling=True),
    "self-consistency": Method(sampling=True, samples=True),
    "self-certainty": Method(sampling=True, samples=True, reads="s2t.methods.sample:SelfCertainty"),
    "llm": Method(needs=("llm",)),
    "takeover": Method("divergence", "s2t.methods.select:Takeover", needs=("llm",)),
    "s2t": Method("divergence", "s2t.methods.select:S2T", needs=("llm",)),
    "s2t-local": Method("criticality", "s2t.methods.select:S2TLocal", needs=("adapter",)),
}

STRATEGIES = tuple(METHODS)
MANY_SAMPLES = tuple(name for name, method in METHODS.items() if method.samples)
SAMPLED = tuple(name for name, method in METHODS.items() if method.sampling)
TRIGGERED = tuple(name for name, method in METHODS.items() if method.selector is not None)
NEEDS_LLM = frozenset(name for name, method in METHODS.items() if "llm" in method.needs)
NEEDS_ADAPTER = frozenset(name for name, method in METHODS.items() if "adapter" in method.needs)
