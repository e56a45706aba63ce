"""A tokenizer as bytes, and the map between two vocabularies that have only text in common.

`TextCodec` says which bytes a token stands for and cuts bytes into tokens, special tokens left out. `VocabularyMap`
projects the LLM's next-token distribution onto the SLM's vocabulary: a text counts for the token the SLM's tokenizer
would cut off it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from s2t.errors import ModelError
from s2t.model.loaded import LoadedModel
from s2t.model.pieces import bytes_of_tokens

_MOST_TEXTS = 2**18  # whose first token is remembered


class TextCodec:
    """Bytes of ids and ids of bytes, for one fast tokenizer; special tokens have no bytes and are never produced."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, reserved: Iterable[int] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{type(tokenizer).__name__} is a slow tokenizer; a pair with different tokenizers needs fast ones."
            )
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True  # a special token's name in a text is plain text
        self.bytes_of = bytes_of_tokens(tokenizer, self._backend, frozenset(reserved))
        self.id_of: dict[bytes, int] = {}
        for token_id in reversed(range(len(self.bytes_of))):
            data = self.bytes_of[token_id]
            if data:
                self.id_of[data] = token_id  # the lowest id, where two tokens stand for the same bytes

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence; special tokens leave none."""
        return b"".join(self.bytes_of[i] or b"" for i in ids)

    def encode(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Token ids of each text as it would stand inside a longer one; bytes that are no character yet, greedily."""
        whole = [_whole_characters(text) for text in texts]
        found = [encoding.ids for encoding in self._encode([text.decode() for text in whole])]
        return [
            self._as_inner(part, ids) + self._greedy(text[len(part) :])
            for text, part, ids in zip(texts, whole, found, strict=True)
        ]

    def first(self, texts: Sequence[bytes]) -> list[int | None]:
        """The token each text begins with; a text that is a token's own is that token."""
        found = [self.id_of.get(text) for text in texts]
        unknown = [i for i, token_id in enumerate(found) if token_id is None]
        for i, ids in zip(unknown, self.encode([texts[i] for i in unknown]), strict=True):
            found[i] = ids[0] if ids else None
        return found

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _as_inner(self, text: bytes, ids: list[int]) -> list[int]:
        """Undo the space that some tokenizers put before a text: cut it behind a line's end instead."""
        if self.join(ids) != b" " + text:
            return ids
        behind = self._encode(["\n" + text.decode()])[0].ids
        for start in range(1, len(behind) + 1):
            if self.join(behind[start:]) == text:
                return behind[start:]
        return ids

    def _greedy(self, data: bytes) -> list[int]:
        """The longest tokens one after another; a byte that no token begins with is left out."""
        ids: list[int] = []
        while data:
            size = next((n for n in range(len(data), 0, -1) if data[:n] in self.id_of), 0)
            if size:
                ids.append(self.id_of[data[:size]])
            data = data[max(size, 1) :]
        return ids


class VocabularyMap:
    """From the LLM's tokens to the SLM's, by text; built once per pair."""

    def __init__(self, slm: LoadedModel, llm: LoadedModel) -> None:
        self.slm, self.llm = slm, llm
        self.slm_codec = TextCodec(slm.tokenizer, slm.reserved.all)
        self.llm_codec = TextCodec(llm.tokenizer, llm.reserved.all)
        self._first: dict[bytes, int] = {}

    @cached_property
    def stop_id(self) -> int | None:
        """The SLM's stop id that any of the LLM's stands for."""
        own, eos = self.slm.stop_ids, self.slm.tokenizer.eos_token_id
        return eos if eos in own else min(own, default=None)

    @cached_property
    def first_ids(self) -> Tensor:
        """The SLM's token that each of the LLM's begins with, or vocab_size for none; [V_L]."""
        none = self.slm.vocab_size
        targets = [none] * self.llm.vocab_size
        texts = {i: data for i, data in enumerate(self.llm_codec.bytes_of[: len(targets)]) if data}
        for i, found in zip(texts, self.slm_codec.first(list(texts.values())), strict=True):
            targets[i] = none if found is None else found
        for i in self.llm.stop_ids:
            if i < len(targets) and self.stop_id is not None:
                targets[i] = self.stop_id
        return torch.tensor(targets, device=self.llm.device)

    def first(self, texts: Sequence[bytes]) -> list[int]:
        """The SLM's token that each text begins with (vocab_size for none), remembered."""
        if len(self._first) > _MOST_TEXTS:
            self._first.clear()
        unknown = [text for text in dict.fromkeys(texts) if text not in self._first]
        for text, found in zip(unknown, self.slm_codec.first(unknown), strict=True):
            self._first[text] = self.slm.vocab_size if found is None else found
        return [self._first[text] for text in texts]

    def project(self, probs: Tensor) -> Tensor:
        """Probabilities of the LLM's tokens as ones of the SLM's; [n, V_L] -> [n, V + 1], the last column for no token."""
        projected = probs.new_zeros(len(probs), self.slm.vocab_size + 1)
        return projected.index_add_(-1, self.first_ids, probs)


def _whole_characters(text: bytes) -> bytes:
    """The longest beginning that is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start]
    return text


class HasTokenizer(Protocol):
    """Whatever a tokenizer belongs to."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...


def same_tokens(slm: HasTokenizer, llm: HasTokenizer) -> bool:
    """Whether both tokenizers give every token the same id; padding rows may differ in number."""
    left: Any = slm.tokenizer.get_vocab()
    return left == llm.tokenizer.get_vocab()
