"""What talking to servers took: calls, retries by cause, tokens and money; plain counters, reported beside results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Prices:
    """Money per million tokens; `cached` is of prompt tokens that the server had cached (None: as any prompt token)."""

    prompt: float = 0.0
    completion: float = 0.0
    cached: float | None = None


@dataclass(slots=True)
class ClientCounts:
    """Counters of one client. `calls` are requests answered, each once; `retries` are attempts that had to be repeated."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    """Attempts that failed and were made again, by cause: 429, 5xx, timeout, connection, bad reply, drained."""
    drained: Counter[str] = field(default_factory=Counter)
    """How often each server, by address, was taken out because it kept failing."""

    def add(self, usage: Mapping[str, Any] | None) -> None:
        """Count an answered call with the `usage` of its reply."""
        self.calls += 1
        usage = usage or {}
        self.prompt_tokens += usage.get("prompt_tokens") or 0
        self.completion_tokens += usage.get("completion_tokens") or 0
        self.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    def cost(self, prices: Prices) -> float:
        """What the tokens cost at these prices."""
        cached = prices.prompt if prices.cached is None else prices.cached
        uncached = self.prompt_tokens - self.cached_tokens
        total = uncached * prices.prompt + self.cached_tokens * cached + self.completion_tokens * prices.completion
        return total / 1e6

    def as_dict(self, prices: Prices | None = None) -> dict[str, Any]:
        """The counters as JSON values, with the cost where there are prices."""
        found: dict[str, Any] = {
            "calls": self.calls,
            "retries": dict(sorted(self.retries.items())),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "drained": dict(sorted(self.drained.items())),
        }
        return found if prices is None or prices == Prices() else found | {"cost": self.cost(prices)}


def merge_reports(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """Two reports of asking servers as one: numbers added, also those within (retries by cause), the rest as it is now."""
    merged = dict(new)
    for key, value in (old or {}).items():
        now = new.get(key)
        if isinstance(value, Mapping) and isinstance(now, Mapping | None):
            merged[key] = merge_reports(value, now or {}) | {k: v for k, v in value.items() if k not in (now or {})}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            merged[key] = value + (now or 0)
    return merged
