"""Messages to prompt ids, stop ids, and incremental detokenizing; the only place where ids meet text.

No text, whoever wrote it, becomes a spare token; those are reserved for reading scores. A text that spells one is encoded by a
twin of the tokenizer that does not know the spare tokens by their names, so that the spelling comes out as plain characters in
their ordinary context; all other special tokens work as ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from s2t.errors import ConfigError, ModelError
from s2t.model.checkpoint import check_ids
from s2t.model.reserved import SPARE_TOKEN, spare_tokens_in
from s2t.model.size import check_size
from s2t.model.template import render

END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
)
_CONTEXT = 16  # tokens that are decoded again with every new one
_UNSPELLABLE = "\ue000spare\ue001{}\ue000"  # private-use characters around a number; see `_unspelled`
_TWINS: WeakKeyDictionary[Any, Tokenizer] = WeakKeyDictionary()


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: str | Sequence[dict[str, str]],
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
) -> list[int]:
    """Token ids of a user message (or a list of messages) under the tokenizer's chat template.

    `system` goes before them; a template that takes no system message gets it at the start of the first user message.
    `variables` are what the template is told beside the messages, such as enable_thinking. Without a template the text is
    encoded as it stands, with whatever BOS the tokenizer adds; a template brings its own, so there are never two. No text
    becomes a reserved token. Raises ConfigError for what are no messages, ModelError for messages that the template refuses,
    and TooLong, before tokenizing, for a text that cannot become as few as `max_tokens` tokens.
    """
    text, is_templated = prompt_text(tokenizer, messages, system, variables)
    if max_tokens is not None:
        check_size(tokenizer, text, max_tokens)
    return encode(tokenizer, text, add_special_tokens=not is_templated)


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: str | Sequence[dict[str, str]],
    system: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, bool]:
    """As `prompt_ids`, before it is tokenized, and whether a chat template wrote it."""
    if isinstance(messages, str):
        turns = [{"role": "user", "content": messages}]
    else:
        check_messages(turns := list(messages))
    if system is not None:
        if any(turn["role"] == "system" for turn in turns):
            raise ConfigError("the messages begin with a system message already; pass no system beside it.")
        turns = [{"role": "system", "content": system}, *turns]
    if tokenizer.chat_template is None:
        return "\n\n".join(turn["content"] for turn in turns), False
    return render(tokenizer, turns, **(variables or {})), True


def check_messages(turns: Sequence[Any]) -> None:
    """Raise ConfigError unless these are messages: dicts of a role and a content, both text."""
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ConfigError(
                f'a message must be {{"role": "user", "content": "..."}}, with text for both; got {str(turn)[:60]!r}.'
            )
    if not turns:
        raise ConfigError("the list of messages is empty; give at least one user message.")


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None) -> frozenset[int]:
    """All ids that end a sequence: the tokenizer's EOS, those of the generation config, and what ends a turn of the chat."""
    found: list[Any] = [tokenizer.eos_token_id]
    found += generation_eos if isinstance(generation_eos, list) else [generation_eos]
    template = str(tokenizer.chat_template or "")
    found += [_id_of(tokenizer, token) for token in END_OF_TURN if token in template]
    return frozenset(check_ids("eos_token_id", [i for i in found if i is not None]))


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    found: Any = tokenizer.convert_tokens_to_ids(token)
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of generated ids without special tokens, spaces as they were."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _has_byte_tokens(backend: Tokenizer) -> bool:
    """Whether a tokenizer falls back to tokens such as <0xE2> (SentencePiece's way)."""
    return backend.decoder is not None and b"ByteFallback" in backend.decoder.__getstate__()


class Detokenizer:
    """Ids in, text pieces out, never half a character: text is held back while it ends in a replacement mark.

    Of a fast tokenizer `tokenizers` does this itself. Of a slow one, and of one that spells characters in byte tokens (whose
    stream raises for bytes that are none), each token is decoded together with a few before it, so that the work per token does
    not grow with the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.tokenizer = tokenizer
        self._backend = backend if isinstance(backend, Tokenizer) and not _has_byte_tokens(backend) else None
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []  # the last tokens
        self._num_shown = 0  # of them, those whose text is known; of a fast tokenizer
        self._shown = ""  # of their text; of a slow one

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._ids.append(token_id)
        if self._backend is None:
            return self._push_slow()
        piece = self._stream.step(self._backend, token_id)
        if piece is None:
            return ""
        del self._ids[: self._num_shown]
        self._num_shown = len(self._ids)
        return piece

    def finish(self) -> str:
        """Whatever was held back."""
        text = decode_ids(self.tokenizer, self._ids)
        if self._backend is not None:
            self._shown = decode_ids(self.tokenizer, self._ids[: self._num_shown])
            self._num_shown = len(self._ids)
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _push_slow(self) -> str:
        text = decode_ids(self.tokenizer, self._ids)
        if text.endswith("\ufffd"):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        if len(self._ids) >= 2 * _CONTEXT:
            self._forget()
        return piece

    def _forget(self) -> None:
        """Drop the older tokens, if the text of the others stays as it is without them."""
        kept = self._ids[-_CONTEXT:]
        text = decode_ids(self.tokenizer, kept)
        if text and self._shown.endswith(text):
            self._ids, self._shown = kept, text


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """Ids of a text, with the tokenizer's own BOS or EOS where asked for, but at most one BOS in front.

    Raises ModelError where the text spells a spare token and the tokenizer is none of the fast ones.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError("the prompt holds a lone surrogate, which is no Unicode text; take it out.") from error
    spelled = spare_tokens_in(text) if SPARE_TOKEN.search(text) else frozenset()
    if spelled and not spelled.isdisjoint(tokenizer.get_vocab()):
        ids = list(_twin(tokenizer, spelled).encode(text, add_special_tokens=add_special_tokens).ids)
    else:
        ids = list(
            tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        )  # silent when long
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _twin(tokenizer: Any, spelled: frozenset[str]) -> Tokenizer:
    """The tokenizer without the names of spare tokens, made once."""
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
