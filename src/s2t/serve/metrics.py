"""What Prometheus is told: requests, tokens, times and the queue. A registry per server, so that two can live in one process."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The server's counters; `render` is the text of /metrics."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("s2t_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "s2t_request_seconds", "Time of a request.", ["path"], buckets=_SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "s2t_first_token_seconds", "Time to a request's first token.", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("s2t_prompt_tokens", "Tokens of prompts.", ["strategy"], registry=registry)
        self.tokens = Counter("s2t_generated_tokens", "Tokens written.", ["strategy"], registry=registry)
        self.triggered = Counter("s2t_triggered_steps", "Steps that triggered.", ["strategy"], registry=registry)
        self.flips = Counter("s2t_flips", "Selections other than the greedy token.", ["strategy"], registry=registry)
        self.slow_heads = Counter(
            "s2t_slow_connections",
            "Connections closed since a request's head was not whole in time.",
            registry=registry,
        )
        self.cancelled = Counter("s2t_cancelled_sequences", "Sequences given up, mostly by clients.", registry=registry)

    def count_slow_head(self) -> None:
        """One connection that was closed with 408, as nothing more is known of its request."""
        self.slow_heads.inc()
        self.requests.labels("other", "408").inc()

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Read two gauges whenever the metrics are asked for."""
        for name, text, read in (
            ("s2t_running_sequences", "Sequences being written.", running),
            ("s2t_waiting_sequences", "Sequences without a row.", waiting),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
