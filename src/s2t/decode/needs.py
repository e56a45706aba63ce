"""What strategies read beside the SLM, and whether it is there; loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from s2t.config import METHODS, ModelConfig, RemoteConfig, needs_of
from s2t.errors import ConfigError
from s2t.model.merged import is_merged, local_folder


def check_needs(config: ModelConfig, strategies: Sequence[str], with_llm: bool = False) -> None:
    """Raise ConfigError where strategies need an LLM or an adapter and the settings name none; loads nothing."""
    needs = needs_by_name(config, strategies)
    names = ", ".join(dict.fromkeys(_who(name, "llm") for name, found in needs.items() if "llm" in found))
    if config.llm is None and (names or with_llm):
        hint = " (its tokenizer, beside --llm-url)" if isinstance(config, RemoteConfig) and config.llm_urls else ""
        raise ConfigError(f"{f'strategy {names}' if names else 'this'} needs the LLM; pass --llm MODEL{hint}.")
    lacking = [_who(name, "adapter") for name, found in needs.items() if "adapter" in found]
    has_none = getattr(config, "adapter", None) is None
    if lacking and has_none and not is_merged(local_folder(config.slm, config.revision)):
        others = ",".join(name for name, found in needs.items() if "adapter" not in found) or "greedy"
        hint = f"; without one: --strategies {others}" if hasattr(config, "strategies") else ""
        raise ConfigError(f"strategy {', '.join(lacking)} needs --adapter, a folder written by `s2t train`{hint}.")


def needs_by_name(config: ModelConfig, strategies: Sequence[str]) -> dict[str, frozenset[str]]:
    """What each strategy, or strategy@trigger, reads beside the SLM, by name."""
    return {name: needs_of(name, str(getattr(config, "trigger", "auto"))) for name in strategies}


def _who(name: str, need: str) -> str:
    """Who needs something: the strategy, or the strategy with its trigger where it is the trigger that does."""
    base = name.partition("@")[0]
    return base if need in METHODS[base].needs else name
