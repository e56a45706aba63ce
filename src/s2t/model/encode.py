"""Text to ids such that no text, whoever wrote it, becomes a spare token; those are reserved for reading scores.

A text that spells one is encoded by a twin of the tokenizer that does not know the spare tokens by their names, so the
spelling comes out as plain characters in their ordinary context; all other special tokens work as ever.
"""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from s2t.errors import ModelError
from s2t.model.reserved import spare_tokens_in

_UNSPELLABLE = "\ue000spare\ue001{}\ue000"  # private-use characters around a number; see `_unspelled`
_TWINS: WeakKeyDictionary[Any, Tokenizer] = WeakKeyDictionary()


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """Ids of a text, with the tokenizer's own BOS or EOS where asked for, but at most one BOS in front.

    Raises ModelError where the text spells a spare token and the tokenizer is none of the fast ones.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError("the prompt holds a lone surrogate, which is no Unicode text; take it out.") from error
    spelled = spare_tokens_in(text)
    if spelled and not spelled.isdisjoint(tokenizer.get_vocab()):
        ids = list(_twin(tokenizer, spelled).encode(text, add_special_tokens=add_special_tokens).ids)
    else:
        ids = list(
            tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        )  # silent when long
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _twin(tokenizer: Any, spelled: frozenset[str]) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"the prompt holds {min(spelled)}, a reserved token of this tokenizer; take it out of the text."
        )
    if tokenizer not in _TWINS:
        _TWINS[tokenizer] = Tokenizer.from_str(json.dumps(_unspelled(json.loads(backend.to_str()))))
        _TWINS[tokenizer].no_truncation()
        _TWINS[tokenizer].no_padding()
    return _TWINS[tokenizer]


def _unspelled(data: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer file with spare tokens under names that no text has; ids stay, in the vocabulary and beside it."""
    for token in data["added_tokens"]:
        token["content"] = _unnamed(token["content"])
    vocab = data["model"].get("vocab")
    if isinstance(vocab, dict):
        data["model"]["vocab"] = {_unnamed(token): i for token, i in vocab.items()}
    elif isinstance(vocab, list):  # of Unigram: pieces with scores
        data["model"]["vocab"] = [[_unnamed(piece), score] for piece, score in vocab]
    return data


def _unnamed(token: str) -> str:
    return _UNSPELLABLE.format(token) if spare_tokens_in(token) == {token} else token
