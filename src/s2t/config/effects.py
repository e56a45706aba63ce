"""Settings that only some strategies, policies or methods read: without one of these they do nothing, so they are refused.

Knows names alone. A default does no harm; only what was asked for is looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from s2t.config.checks import require

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
