"""S2T-LOCAL's readings over a completions API: what a server must be asked for, and criticality and scores from the replies.

Bins and criticality are differences of log-probabilities of reserved ids, and readout `rank` compares log-probabilities of
candidates under the adapter, so any server that lists chosen ids can be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from s2t.config.shared import READOUTS
from s2t.core.rule import criticality, expected_bin, score
from s2t.decode.remote.client import Client
from s2t.decode.remote.wire import Completion, CompletionRequest
from s2t.errors import ConfigError, ModelError
from s2t.methods.strategies import Strategy
from s2t.model.adapter import AdapterConfig, adapter_config
from s2t.model.loaded import LoadedModel

SERVED_SCOPES = ("always", "stream")
SERVED_STRATEGIES = ("greedy", "s2t-local")
_TRIGGERS = ("criticality", "random", "never")
_PROBE, _PROBE_TOKENS = (5, 6, 7, 8, 9, 10, 11, 12), 32
_APART, _APART_ALL = 0.5, 0.1  # nats, of one value and in the mean of all; what a batch's own rounding changes is below


@dataclass(frozen=True, slots=True)
class ServedSelector:
    """The reserved ids of a merged folder and how they are read; `lora` names the adapter on the server (scope `stream`)."""

    config: AdapterConfig
    bins: tuple[int, ...]
    """Under readout `rank` nothing is read from them."""
    yes_no: tuple[int, int] | None
    """None where criticality is no output row (reading `head`)."""
    scale: float = 1.0
    """That the model puts on its logits; the rows were trained without."""
    lora: str | None = None

    def criticality(self, logprobs: Mapping[int, float]) -> float:
        """sigmoid(z_yes - z_no) from the listed log-probabilities at one position, in [0, 1]. Source: METHOD section 3."""
        assert self.yes_no is not None
        yes, no = (logprobs[i] for i in self.yes_no)
        return float(criticality(torch.tensor(yes - no, dtype=torch.float64), self.scale))

    def expected(self, logprobs: Mapping[int, float]) -> float:
        """Expected bin of a candidate, in [0, 1], from the log-probabilities listed behind it."""
        values = torch.tensor([logprobs[i] for i in self.bins], dtype=torch.float64)  # [R]
        return float(expected_bin(values, self.scale))

    @property
    def ranks(self) -> bool:
        """Whether the adapter is read at the prefix (readout `rank`), and not behind every candidate."""
        return self.config.readout == "rank"

    @property
    def temperature(self) -> float:
        """What the adapter's reading is divided by."""
        return 1.0 if self.ranks else self.config.score_temperature

    @property
    def prior_weight(self) -> float:
        """lambda, the weight of log p_S."""
        return 1 - self.config.adapter_weight if self.ranks else self.config.prior_weight

    def score(self, reading: float, logprob: float) -> float:
        """w r + lambda log p_S, where `reading` is the expected bin or log p_A; see `core.rule.score`."""
        return score(reading / self.temperature, logprob, self.config.adapter_weight, self.prior_weight)


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
        able = " or ".join(scope for scope in SERVED_SCOPES if scope in READOUTS[config.readout])
        raise ConfigError(
            f"{loaded.name} has scope {config.scope}, which acts on single tokens inside a forward; train with "
            f"--adapter-scope {able} for a server."
        )
    yes_no = merged.reserved.criticality if config.criticality == "reserved" else None
    if merged.head.get("softcap") and (config.readout == "bins" or yes_no is not None):
        raise ModelError(f"{loaded.name} caps its logits, so reserved ids cannot be read from log-probabilities.")
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
    """Raise ConfigError where requests of the base change when those of the LoRA run beside them.

    They have where a value is far from what the base says alone, or where all are closer to what the LoRA says.
    """
    ids = _PROBE if selector.ranks else selector.bins[:2]
    base = CompletionRequest(
        _PROBE, max_tokens=_PROBE_TOKENS, logprob_token_ids=ids, extra={"ignore_eos": True, "min_tokens": _PROBE_TOKENS}
    )
    alone = await client.complete(base)
    beside = await client.complete_all([base, replace(base, model=selector.lora)] * 2)
    for found in beside[::2]:
        from_base, from_lora = _gaps(found, alone, ids), _gaps(found, beside[1], ids)
        if max(from_base) > _APART or fmean(from_base) > max(_APART_ALL, fmean(from_lora)):
            raise ConfigError(
                f"the server lets LoRA {selector.lora} act on requests of its base in the same batch, as vLLM does on a CPU "
                "when every LoRA slot is taken; start it with --max-loras 2."
            )


def _gaps(one: Completion, other: Completion, ids: Sequence[int]) -> list[float]:
    """Differences of the ids' log-probabilities, in nats, at the tokens that both wrote behind the same prefix."""
    gaps = []
    pairs = zip(one.token_ids, one.logprobs, other.token_ids, other.logprobs, strict=False)
    for token, own, other_token, theirs in pairs:
        gaps += [abs(own[i] - theirs[i]) for i in ids]
        if token != other_token:
            break
    return gaps


def check_served(strategies: Sequence[str]) -> None:
    """Raise ConfigError where a strategy needs the SLM in this process."""
    if others := [name for name in strategies if name not in SERVED_STRATEGIES]:
        raise ConfigError(
            f"an SLM on a server writes with {' or '.join(SERVED_STRATEGIES)}; got {', '.join(others)}; drop --slm-url for these."
        )


def check_strategy(strategy: Strategy, served: ServedSelector | None) -> None:
    """Raise ConfigError for a strategy or trigger that needs more than a server gives; `served` is None for greedy."""
    if strategy.name not in SERVED_STRATEGIES:
        raise ConfigError(
            f"an SLM on a server writes with {' or '.join(SERVED_STRATEGIES)}; got {strategy.name}; drop --slm-url."
        )
    name = strategy.trigger.name
    if name not in _TRIGGERS:
        raise ConfigError(f"an SLM on a server takes trigger {', '.join(_TRIGGERS)}; got {name}.")
    if strategy.name == "s2t-local" and served is None:
        raise ConfigError("s2t-local on a server needs --slm FOLDER, one that `s2t merge` wrote.")
    if name == "criticality" and (served is None or served.yes_no is None):
        raise ConfigError(
            "on a server criticality is read from reserved ids, and this adapter has a head; train with --criticality reserved."
        )
