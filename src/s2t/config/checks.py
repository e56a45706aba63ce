"""Checks of settings: each raises ConfigError with what was expected and what came."""

from __future__ import annotations

import os

from s2t.errors import ConfigError

_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # bytes, as file systems have it


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise ConfigError unless low <= value <= high."""
    require(low <= value <= high, f"{name} must be within {low}..{high}; got {value}.")


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def check_at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        require(value >= low, f"{name} must be at least {low}; got {value}.")


def check_positive(hint: str = "", /, **values: float) -> None:
    for name, value in values.items():
        require(value > 0, f"{name} must be above 0; got {value}{hint}.")


def check_folder(name: str, value: str) -> None:
    """Raise ConfigError for a path that no folder can have: empty, with a part that is too long, or with a null character."""
    require(bool(value.strip()), f"{name} must name a folder, and is empty; pass a path.")
    longest = max(len(os.fsencode(part)) for part in value.split(os.sep))
    is_one = longest <= _LONGEST_NAME and len(os.fsencode(value)) < _LONGEST_PATH and "\0" not in value
    require(
        is_one, f"{name} must be a path that a folder can have; got one of {len(value)} characters: {value[:60]!r}."
    )
