"""How many tokens prompt and answer may have together: what the models can read. What does not fit is refused or cut, here alone.

A prompt that leaves no room for one token is refused; an answer ends where the room does. The server refuses in its own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from s2t.decode.rows import Request
from s2t.errors import ContextError
from s2t.model.load import LoadedModel

R = TypeVar("R", bound=Request)


def context_length(models: Iterable[LoadedModel]) -> int | None:
    """Tokens that all of these models can read; None where none of them has a limit."""
    return min((length for loaded in models if (length := loaded.context_length)), default=None)


def prompt_length(request: Request) -> int:
    """Tokens of a prompt, in the tokens of the model that has more of them."""
    return max(len(request.prompt_ids), len(request.llm_prompt_ids or ()))


def fit(requests: Sequence[R], max_new_tokens: int, length: int | None) -> list[R]:
    """The requests, each with a limit of its own that fits into so many tokens; ContextError for a prompt that leaves none."""
    return [_fitted(request, max_new_tokens, length) for request in requests]


def check_fits(request: Request, length: int | None, what: str = "the prompt") -> None:
    """Raise ContextError where a prompt leaves no room for one token of an answer."""
    count = prompt_length(request)
    if length is not None and count >= length:
        raise ContextError(
            f"{what} has {count} tokens, and the models read up to {length} of prompt and answer together; shorten it, or "
            "use models that read more."
        )


def _fitted(request: R, max_new_tokens: int, length: int | None) -> R:
    check_fits(request, length)
    asked = request.max_new_tokens or max_new_tokens
    return replace(request, max_new_tokens=asked if length is None else min(asked, length - prompt_length(request)))
