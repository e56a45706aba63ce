"""What belongs to a prompt beside its tokens: the key of its random numbers, variables of its template, what it may hold, and how
many tokens it and its answer may have together.

A prompt that leaves no room for one token is refused; an answer ends where the room does. The server refuses in its own words.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from s2t.decode.rows import Request
from s2t.errors import ContextError, ModelError
from s2t.progress import note


class KnownModel(Protocol):
    """What a model is here, loaded or on servers."""

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def vocab_size(self) -> int: ...


class LimitedModel(Protocol):
    """A model that reads so many tokens at most."""

    @property
    def context_length(self) -> int | None: ...


def prompt_key(prompt: str | Sequence[dict[str, str]], system: str | None = None) -> str:
    """What the random numbers of a prompt depend on, beside the seed."""
    return prompt if isinstance(prompt, str) and system is None else json.dumps([system, prompt])


def ids_key(ids: Sequence[int]) -> str:
    """As `prompt_key`, for a prompt of token ids."""
    return str(list(ids))


def sample_key(key: str, place: int) -> str:
    """As `prompt_key`, for one of several samples of the same prompt."""
    return f"{key}/{place}"


def checked_ids(loaded: KnownModel, ids: list[int]) -> list[int]:
    """The ids of a prompt; raises ModelError where there are none, or one that the model has no row for."""
    if not ids:
        raise ModelError("the prompt is empty after tokenizing; give some text.")
    if (least := min(ids)) < 0:
        raise ModelError(f"the prompt holds the id {least}; token ids are 0 to {loaded.vocab_size - 1}.")
    if max(ids) >= loaded.vocab_size:
        token = loaded.tokenizer.convert_ids_to_tokens(max(ids))
        raise ModelError(f"the prompt holds {token}, which {loaded.name} has no embedding for; take it out.")
    return ids


def note_unread(variables: Mapping[str, Any], models: Sequence[KnownModel]) -> None:
    """Say on stderr which variables no chat template of these models reads: a slip in a name would change nothing."""
    templates = " ".join(str(model.tokenizer.chat_template or "") for model in models)
    if unread := [name for name in variables if not re.search(rf"\b{re.escape(name)}\b", templates)]:
        note(f"the chat template of {models[0].name} does not read {', '.join(unread)}; the prompts are as without.")


R = TypeVar("R", bound=Request)


def context_length(models: Iterable[LimitedModel]) -> int | None:
    """Tokens that all of these models can read; None where none of them has a limit."""
    return min((length for loaded in models if (length := loaded.context_length)), default=None)


def prompt_length(request: Request) -> int:
    """Tokens of a prompt, in the tokens of the model that has more of them."""
    return max(len(request.prompt_ids), len(request.llm_prompt_ids or ()))


def fit(requests: Sequence[R], max_new_tokens: int, length: int | None) -> list[R]:
    """The requests, each with a limit of its own that fits into so many tokens; ContextError for a prompt that leaves none."""
    fitted = []
    for request in requests:
        check_fits(request, length)
        room = math.inf if length is None else length - prompt_length(request)
        fitted.append(replace(request, max_new_tokens=int(min(request.max_new_tokens or max_new_tokens, room))))
    return fitted


def check_fits(request: Request, length: int | None, what: str = "the prompt") -> None:
    """Raise ContextError where a prompt leaves no room for one token of an answer."""
    count = prompt_length(request)
    if length is not None and count >= length:
        raise ContextError(
            f"{what} has {count} tokens, and the models read up to {length} of prompt and answer together; shorten it, or "
            "use models that read more."
        )


def without_context(messages: str | Sequence[dict[str, str]]) -> str | list[dict[str, str]]:
    """A prompt with the last sentence of its last message alone: what is asked, without what it is asked about."""
    if isinstance(messages, str):
        return _last_sentence(messages)
    return [*messages[:-1], messages[-1] | {"content": _last_sentence(messages[-1]["content"])}]


def _last_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?\n])\s+", text.strip())[-1]
