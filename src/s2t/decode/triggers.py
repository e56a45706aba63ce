"""Triggers: rules that read one number per row and fire when it passes a threshold in the rule's own unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2t.core.support import divergence, entropy, resolve_support, self_certainty
from s2t.decode.state import State


class Trigger:
    """Base of all triggers: never fires and reads nothing."""

    name = "never"
    needs_llm = False

    def read(self, state: State) -> Tensor | None:
        """One value per active row, [n], or None when nothing is read."""
        return None

    def fires(self, values: Tensor, threshold: float) -> Tensor:
        """Which rows fire; [n] -> bool [n]."""
        return values > threshold


class Never(Trigger):
    """Plain decoding."""


class SelfCertainty(Trigger):
    """Never fires; reads how far the next-token distribution is from uniform, KL(U || p) in nats, to rank samples by.

    Source: Kang, Zhao, Song 2025 (arXiv 2502.18581), self-certainty, over the tokens that may be written.
    """

    name = "self-certainty"

    def read(self, state: State) -> Tensor:
        return self_certainty(state.logits)

    def fires(self, values: Tensor, threshold: float) -> Tensor:
        return torch.zeros_like(values, dtype=torch.bool)


class Random(Trigger):
    """Fires with a fixed probability; the threshold is that probability."""

    name = "random"

    def read(self, state: State) -> Tensor:
        return state.uniforms

    def fires(self, values: Tensor, threshold: float) -> Tensor:
        return values < threshold


class Entropy(Trigger):
    """Entropy of the SLM's next-token distribution, nats."""

    name = "entropy"

    def read(self, state: State) -> Tensor:
        return entropy(state.logits)


@dataclass
class Divergence(Trigger):
    """Disagreement of LLM and SLM, nats; reads the LLM at every token. Source: arXiv 2604.26940."""

    support_size: int = 64
    kind: str = "llm-slm"
    support: str = "auto"
    name = "divergence"
    needs_llm = True

    def read(self, state: State) -> Tensor:
        support, size = resolve_support(self.support, self.support_size, self.kind, state.num_listed)
        return divergence(state.llm_logits(), state.logits, size, self.kind, support)


class Criticality(Trigger):
    """The SLM's own estimate, in [0, 1], that the step is a divergence point; no LLM."""

    name = "criticality"

    def read(self, state: State) -> Tensor:
        adapter = state.engine.adapter
        assert adapter is not None, "criticality is read from an adapter"
        with torch.inference_mode():
            return adapter.criticality(state.hidden)
