"""Errors a user can cause or fix; each carries one clear line: what, expected, got, next step.

The command line prints the message and exits with the class's `exit_code`: 2 for usage, 1 for failure.
"""

from __future__ import annotations


class S2TError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 2


class ConfigError(S2TError):
    """A setting is unknown, out of range, or does not fit another setting."""


class DataError(S2TError):
    """A problem file, shard or run folder cannot be read as what it should be."""


class ModelError(S2TError):
    """A model, tokenizer or adapter is missing, unsupported, or does not fit the other one."""


class ContextError(ModelError):
    """A prompt is longer than a model can read."""


class OverlapError(DataError):
    """Problems appear in two splits that must be disjoint."""


class WorkerError(S2TError):
    """Processes or actors that share the work were lost again and again."""

    exit_code = 1


class RemoteError(S2TError):
    """A server that runs a model refused a request, or did not answer it however often it was asked.

    `status` is the HTTP status of a refusal.
    """

    exit_code = 1

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class MissingExtraError(S2TError):
    """An optional dependency is needed; the message carries the install command."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """Build the error for a missing optional dependency, e.g. `missing_extra("peft", "train")`."""
    return MissingExtraError(f"{package} is not installed; run: pip install 's2t[{extra}]'.")
