"""Checks of settings: each raises ConfigError with what was expected and what came.

Some settings are read by some strategies, policies or methods alone: without one of these they do nothing, so they are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from s2t.errors import ConfigError

_TAKEN = (
    *("messages", "conversation", "conversations", "chat_template", "tools", "documents", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
)
_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes, as file systems have it


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ConfigError unless low <= value <= high."""
    require(low <= value <= high, f"{name} must be within {low}..{high}; got {value}.")


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    require(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def check_at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        require(value >= low, f"{name} must be at least {low}; got {value}.")


def check_positive(hint: str = "", /, **values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"{name} must be above 0; got {value}{hint}.")


def read_variables(given: Any, name: str = "chat_template_kwargs") -> dict[str, Any]:
    """Variables of a chat template, a dict or the text of a JSON object, as a dict; None is none.

    Raises ConfigError for anything else, and for names that a chat template is given by other ways.
    """
    if given is None:
        return {}
    try:
        values = json.loads(given if isinstance(given, str) else json.dumps(given))
    except (TypeError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(
            f'{name} must be a JSON object such as {{"enable_thinking": false}}; got {str(given)[:60]!r}.'
        )
    taken = [key for key in values if key in _TAKEN]
    require(
        not taken, f"{name} cannot set {', '.join(taken)}; give variables of the template, such as enable_thinking."
    )
    return values


def check_folder(name: str, value: str) -> None:
    """Raise ConfigError for a path that no folder can have: empty, with a part that is too long, or with a null character."""
    require(bool(value.strip()), f"{name} must name a folder, and is empty; pass a path.")
    longest = max(len(os.fsencode(part)) for part in value.split(os.sep))
    is_one = longest <= _LONGEST_NAME and len(os.fsencode(value)) < _LONGEST_PATH and "\0" not in value
    require(
        is_one, f"{name} must be a path that a folder can have; got one of {len(value)} characters: {value[:60]!r}."
    )


Readers = Mapping[str, tuple[str, ...]]
"""Setting -> who reads it."""


def check_effects(given: Collection[str], chosen: Sequence[str], readers: Readers, what: str = "strategy") -> None:
    """Raise ConfigError for a given setting that none of the chosen ones reads."""
    for name in sorted(given):
        known = readers.get(name, tuple(chosen))
        flag = f"--{name.replace('_', '-')}"
        require(
            not chosen or any(one in known for one in chosen),
            f"{name} has no effect with {what} {', '.join(chosen)}: it is read by {', '.join(known)}; leave {flag} out.",
        )
