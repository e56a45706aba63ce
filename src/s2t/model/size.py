"""The fewest tokens that a text can become, from its bytes alone: what cannot fit a model is known before it is tokenized.

Every token covers so many bytes of each kind at most, so kinds get weights that no token exceeds in sum; the weights of a
text's bytes are then a lower bound. It holds for tokenizers that lose no byte, and there is none for others.
"""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from s2t.errors import ModelError
from s2t.model.pieces import bytes_of_tokens

_SPACES = bytes(i for i in range(128) if chr(i).isspace())
_WORDS = bytes(i for i in range(128) if chr(i).isalnum())
_HIGH = bytes(range(128, 256))
_OTHERS = bytes(i for i in range(128) if i not in _SPACES + _WORDS)
_KINDS = (_WORDS, _HIGH, _OTHERS, _SPACES)
_DELETED = tuple(bytes(i for i in range(256) if i not in kind) for kind in _KINDS)
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_KEEPING = frozenset({"ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "Sequence", "UnicodeScripts"})
_BOUNDS: WeakKeyDictionary[Any, _Bound | None] = WeakKeyDictionary()


class TooLong(ModelError):
    """A prompt that cannot fit, found out before it was tokenized; `least` is the fewest tokens it can have."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__(f"the prompt has at least {least} tokens, and {most} are the limit; shorten it.")
        self.least = least


def check_size(tokenizer: Any, text: str, max_tokens: int) -> None:
    """Raise TooLong where a text must become more than `max_tokens` tokens."""
    if len(text) > max_tokens and (least := least_tokens(tokenizer, text)) > max_tokens:
        raise TooLong(least, max_tokens)


def least_tokens(tokenizer: Any, text: str) -> int:
    """A number of tokens that the text's encoding has at least; 0 where this tokenizer gives no bound."""
    if tokenizer not in _BOUNDS:
        _BOUNDS[tokenizer] = _Bound.of(tokenizer)
    bound = _BOUNDS[tokenizer]
    return 0 if bound is None else bound.least(text)


@dataclass(frozen=True, slots=True)
class _Bound:
    form: str | None  # Unicode normalization that the tokenizer applies
    weights: tuple[float, ...]  # of a byte of each kind

    @classmethod
    def of(cls, tokenizer: Any) -> _Bound | None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        data = json.loads(backend.to_str())
        forms = _forms(data)
        if forms is None or len(forms) > 1 or not _keeps_bytes(data):
            return None
        pieces = {piece for piece in bytes_of_tokens(tokenizer, backend, frozenset()) if piece}
        added = tokenizer.added_tokens_decoder.values()
        pieces |= {token.content.encode() for token in added if token.content}
        strips = any(token.lstrip or token.rstrip for token in added)  # they swallow any number of spaces
        return cls(forms[0] if forms else None, _weights(np.array([_counts(piece) for piece in pieces]), strips))

    def least(self, text: str) -> int:
        normal = text if self.form is None else unicodedata.normalize(self.form, text)  # type: ignore[arg-type]
        counts = _counts(normal.encode("utf-8", "replace"))
        return math.floor(sum(w * n for w, n in zip(self.weights, counts, strict=True)) + 1e-6)


def _counts(data: bytes) -> list[int]:
    """Bytes of each kind."""
    return [len(data.translate(None, deleted)) for deleted in _DELETED]


def _weights(counts: np.ndarray, strips: bool) -> tuple[float, ...]:
    """Weights of the kinds with which no token weighs more than 1; counts [tokens, kinds]."""
    weights = np.full(counts.shape[1], 1 / max(1, counts.sum(axis=1).max()))
    for kind in range(counts.shape[1]):
        has = counts[:, kind] > 0
        if has.any():  # as heavy as the lightest room that the other kinds leave
            others = counts[has] @ weights - counts[has, kind] * weights[kind]
            weights[kind] = float(((1 - others) / counts[has, kind]).min())
    if strips:
        weights[_KINDS.index(_SPACES)] = 0
    return tuple(float(weight) for weight in weights)


def _forms(data: dict[str, Any]) -> list[str] | None:
    """The Unicode normalizations of a tokenizer file; None where its normalizer does more than that and marking spaces."""
    forms = []
    for part in _parts(data.get("normalizer"), "normalizers"):
        marks_spaces = (
            part["type"] == "Replace" and part.get("pattern") == {"String": " "} and part.get("content") == "▁"
        )
        if part["type"] in _FORMS:
            forms.append(part["type"])
        elif part["type"] != "Prepend" and not marks_spaces:
            return None
    return forms


def _keeps_bytes(data: dict[str, Any]) -> bool:
    """Whether every byte of a text ends up in some token."""
    cutters = _parts(data.get("pre_tokenizer"), "pretokenizers")
    kept = all(part["type"] in _KEEPING and part.get("behavior") != "Removed" for part in cutters)
    knows_all = bool(data["model"].get("byte_fallback")) or any(part["type"] == "ByteLevel" for part in cutters)
    return kept and knows_all and data["model"]["type"] in ("BPE", "Unigram")


def _parts(node: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer's part, sequences unpacked."""
    if node is None:
        return []
    return [part for inner in node[name] for part in _parts(inner, name)] if node["type"] == "Sequence" else [node]
