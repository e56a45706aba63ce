"""Checks of settings: each raises ConfigError with what was expected and what came."""

from __future__ import annotations

from s2t.errors import ConfigError


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
