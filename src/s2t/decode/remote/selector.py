"""S2T-LOCAL's readings over a completions API: what a server must be asked for, and criticality and scores from the replies.

Everything is a difference of log-probabilities of reserved ids, so any server that lists chosen ids can be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from s2t.decode.remote.client import Client
from s2t.decode.remote.wire import CompletionRequest
from s2t.errors import ConfigError, ModelError
from s2t.model.adapter import AdapterConfig, adapter_config
from s2t.model.load import LoadedModel

SERVED_SCOPES = ("always", "stream")
_PROBE, _PROBE_TOKENS = (5, 6, 7, 8, 9, 10, 11, 12), 32
_APART = 0.5  # nats; what a batch's own rounding changes is far below


@dataclass(frozen=True, slots=True)
class ServedSelector:
    """The reserved ids of a merged folder and how they are read; `lora` names the adapter on the server (scope `stream`)."""

    config: AdapterConfig
    bins: tuple[int, ...]
    yes_no: tuple[int, int] | None
    """None where criticality is no output row (reading `head`)."""
    scale: float = 1.0
    """That the model puts on its logits; the rows were trained without."""
    lora: str | None = None

    def criticality(self, logprobs: Mapping[int, float]) -> float:
        """sigmoid(z_yes - z_no) from the listed log-probabilities at one position, in [0, 1]. Source: METHOD section 3."""
        assert self.yes_no is not None
        yes, no = (logprobs[i] for i in self.yes_no)
        return _sigmoid((yes - no) / self.scale)

    def expected(self, logprobs: Mapping[int, float]) -> float:
        """Expected bin of a candidate, in [0, 1], from the log-probabilities listed behind it."""
        values = [logprobs[i] / self.scale for i in self.bins]
        top = max(values)
        weights = [math.exp(value - top) for value in values]
        return sum(i * weight for i, weight in enumerate(weights)) / sum(weights) / (len(weights) - 1)

    def score(self, expected: float, logprob: float) -> float:
        """e / temperature + lambda log p_S."""
        return expected / self.config.score_temperature + self._prior(logprob)

    def ceiling(self, logprob: float) -> float:
        """The score that a candidate of this log-probability has at most."""
        return self.score(1.0, logprob)

    def _prior(self, logprob: float) -> float:
        return self.config.prior_weight * logprob if self.config.prior_weight else 0.0


def served_selector(loaded: LoadedModel, models: Sequence[Mapping[str, Any]], lora: str | None) -> ServedSelector:
    """How to read the merged folder `loaded` from a server that serves `models`; `lora` None takes the only LoRA there.

    Raises ConfigError or ModelError, one line, for a folder whose selector no server can run.
    """
    merged = loaded.merged
    if merged is None:
        raise ConfigError(
            f"s2t-local on a server needs a folder that `s2t merge` wrote, as --slm, and served; {loaded.name} is none."
        )
    config = adapter_config(merged.adapter)
    if config.scope not in SERVED_SCOPES:
        raise ConfigError(
            f"{loaded.name} has scope {config.scope}, which acts on single tokens inside a forward; train with "
            "--adapter-scope always or stream for a server."
        )
    if merged.head.get("softcap"):
        raise ModelError(f"{loaded.name} caps its logits, so its bins cannot be read from log-probabilities.")
    yes_no = merged.reserved.criticality if config.criticality == "reserved" else None
    name = _lora_name(models, lora) if config.scope == "stream" else None
    return ServedSelector(config, merged.reserved.bins, yes_no, merged.head.get("scale") or 1.0, name)


def _lora_name(models: Sequence[Mapping[str, Any]], lora: str | None) -> str:
    names = [str(model["id"]) for model in models if model.get("parent")]
    if lora is not None and (lora in names or not names):
        return lora
    if lora is None and len(names) == 1:
        return names[0]
    shown = ", ".join(names) or "no LoRA"
    raise ConfigError(
        f"scope stream needs the adapter as a LoRA on the server, which has {shown}; start vLLM with --enable-lora "
        "--lora-modules s2t=FOLDER/s2t_adapter, or name it with --slm-lora."
    )


async def check_apart(selector: ServedSelector, client: Client) -> None:
    """Raise ConfigError where requests of the base change when those of the LoRA run beside them."""
    ids = selector.bins[:2]
    base = CompletionRequest(
        _PROBE, max_tokens=_PROBE_TOKENS, logprob_token_ids=ids, extra={"ignore_eos": True, "min_tokens": _PROBE_TOKENS}
    )
    alone = await client.complete(base)
    beside = await client.complete_all([base, replace(base, model=selector.lora)] * 2)
    for found in beside[::2]:
        pairs = zip(alone.token_ids, alone.logprobs, found.token_ids, found.logprobs, strict=False)
        for token, own, other_token, other in pairs:
            if any(abs(own[i] - other[i]) > _APART for i in ids):
                raise ConfigError(
                    f"the server lets LoRA {selector.lora} act on requests of its base in the same batch, as vLLM does on a CPU "
                    "when every LoRA slot is taken; start it with --max-loras 2."
                )
            if token != other_token:  # from here on the two read different prefixes
                break


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))
