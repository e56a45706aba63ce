"""What `s2t generate` and `s2t chat` share: the models are opened, and who answers is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2t.config import GenerateConfig

if TYPE_CHECKING:
    from s2t.api import Reasoner


def open_reasoner(config: GenerateConfig) -> Reasoner:
    """Load the SLM, what selects beside it if anything does, and the LLM only where the strategy reads it."""
    from s2t.api import open_reasoner as opened

    is_read = config.trigger == "divergence"
    if config.strategy is None:
        return opened(config, None, is_read)
    return opened(config, [config.strategy], is_read or None)


def say_who_answers(config: GenerateConfig) -> None:
    """A line on stderr where it is the embedded model, which few people mean to ask."""
    from s2t.model.tiny import is_embedded
    from s2t.progress import note

    name = config.llm if config.strategy == "llm" and config.llm is not None else config.slm
    if is_embedded(name):
        note(f"{name} answers, a tiny model of s2t's own that can do little but sums; pass --slm MODEL for another.")
