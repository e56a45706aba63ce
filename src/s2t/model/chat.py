"""Messages to prompt ids, stop ids, and incremental detokenizing; the only place where ids meet text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: str | Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a user message (or a list of messages) under the tokenizer's chat template.

    Without a template the text is encoded as it stands, with whatever BOS the tokenizer adds; a template
    brings its own, so none is added twice.
    """
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if tokenizer.chat_template is None:
        return list(tokenizer("\n\n".join(turn["content"] for turn in turns))["input_ids"])
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None) -> frozenset[int]:
    """All ids that end a sequence: the tokenizer's EOS and those of the generation config."""
    found: list[Any] = [tokenizer.eos_token_id]
    found += generation_eos if isinstance(generation_eos, list) else [generation_eos]
    return frozenset(int(i) for i in found if i is not None)


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of generated ids without special tokens, spaces as they were."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Detokenizer:
    """Ids in, text pieces out, never half a character: text is held back while it ends in a replacement mark."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.emitted = ""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        self.ids.append(token_id)
        text = decode_ids(self.tokenizer, self.ids)
        if text.endswith("\ufffd"):
            return ""
        piece, self.emitted = text[len(self.emitted) :], text
        return piece

    def finish(self) -> str:
        """Whatever was held back."""
        text = decode_ids(self.tokenizer, self.ids)
        piece, self.emitted = text[len(self.emitted) :], text
        return piece
