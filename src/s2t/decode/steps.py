"""Steps of the text while tokens are written: where one ends, and which earlier layers a method reads."""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedTokenizerBase

from s2t.model.chat import encode
from s2t.model.engine import Engine
from s2t.model.tiny import is_embedded

_LONGEST_TAIL = 64  # characters


class StepTexts:
    """The text behind tokens, as far as steps need it: a step is over with the token that completes its end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: str) -> None:
        self.tokenizer, self.end = tokenizer, end
        self._piece = cache(lambda token: str(tokenizer.decode([token])))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: str, end: str | None) -> StepTexts:
        """A line break ends the embedded models' steps, a blank line those of others, unless `end` is given."""
        return cls(tokenizer, end or ("\n" if is_embedded(model) else "\n\n"))

    def ends(self, tail: str, token: int) -> bool:
        """Whether a token behind such a text completes the end of a step."""
        return self.end in tail[max(0, len(tail) - len(self.end) + 1) :] + self._piece(token)

    def after(self, tail: str, token: int) -> str:
        """The last characters with the token behind them."""
        return (tail + self._piece(token))[-max(_LONGEST_TAIL, len(self.end)) :]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that goes on where another stops."""
        return list(encode(self.tokenizer, text, add_special_tokens=False))


def earlier_layers(engine: Engine, part: str) -> tuple[int, ...]:
    """Every second layer of the lower or the upper half (of more than 40 layers: the first or the last 20).

    The embeddings, layer 0, are left out where they are the output's as well. Source: Chuang et al. 2024 (arXiv 2309.03883).
    """
    count = int(engine.config.num_hidden_layers)
    is_tied = bool(getattr(engine.model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    first = 0 if not is_tied else min(2, count - 1)
    middle = count // 2 if count <= 40 else (20 if part == "low" else count - 20)
    found = range(first, middle, 2) if part == "low" else range(max(first, middle), count, 2)
    return tuple(found) or (first,)
