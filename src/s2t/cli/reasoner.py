"""What `s2t generate` and `s2t chat` share: a config becomes a loaded reasoner and its decode settings."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from s2t.config import READERS, DecodeConfig, GenerateConfig, RemoteConfig, needs_of

if TYPE_CHECKING:
    from s2t.api import Reasoner


def load_reasoner(config: GenerateConfig) -> Reasoner:
    """Load the SLM, its adapter if any, and the LLM only where the strategy or the trigger asks for it."""
    from s2t.api import load

    strategy = config.strategy or "greedy"
    needs_llm = "llm" in needs_of(strategy, config.trigger) or config.trigger == "divergence"
    return load(
        config.slm,
        llm=config.llm if needs_llm else None,
        adapter=config.adapter,
        llm_revision=config.llm_revision,
        llm_quantization=config.llm_quantization,
        slm_url=config.slm_url,
        slm_lora=config.slm_lora,
        chat_template_kwargs=config.chat_template_kwargs,
        **config.load_options,
        **{item.name: getattr(config, item.name) for item in fields(RemoteConfig) if needs_llm},
    )


def decode_settings(config: GenerateConfig) -> dict[str, Any]:
    """Keyword arguments of `Reasoner.generate` and `Reasoner.stream`: strategy, seed and decode settings; of those that not
    every strategy reads, the ones that are not as they are by default."""
    names = {item.name for item in fields(DecodeConfig)} - {"adapter"}
    names -= {name for name in READERS if getattr(config, name) == getattr(DecodeConfig, name)}
    return {name: getattr(config, name) for name in sorted(names | {"strategy", "seed"})}


def say_who_answers(config: GenerateConfig) -> None:
    """A line on stderr where it is the embedded model, which few people mean to ask."""
    from s2t.model.tiny import is_embedded
    from s2t.progress import note

    name = config.llm if config.strategy == "llm" and config.llm is not None else config.slm
    if is_embedded(name):
        note(f"{name} answers, a tiny model of s2t's own that can do little but sums; pass --slm MODEL for another.")
