"""The bytes that a tokenizer's tokens stand for, read from its vocabulary. Knows byte-level and SentencePiece spellings."""

from __future__ import annotations

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}


def bytes_of_tokens(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, reserved: frozenset[int]
) -> list[bytes | None]:
    """The bytes of every id; None for special tokens and for ids without a token."""
    decoder = json.dumps(json.loads(backend.to_str()).get("decoder"))
    is_byte_level = '"ByteLevel"' in decoder
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | reserved
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    vocab: dict[str, int] = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if i in special:
            continue
        if i in added:
            found[i] = added[i].encode()
        else:
            found[i] = _from_byte_level(token) if is_byte_level else _from_pieces(token)
    return found


def _from_byte_level(token: str) -> bytes | None:
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    return token.encode()


def _from_pieces(token: str) -> bytes:
    """SentencePiece's spelling: a bar for a space, <0x0A> for a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
