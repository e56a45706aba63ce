"""`s2t bench`: decoding speed against transformers, and of selection against greedy, in one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts, print_table
from s2t.config import BenchConfig


def show(result: Mapping[str, Any]) -> None:
    rows = [(name, result["seconds"][name], speed) for name, speed in result["tokens_per_s"].items()]
    print_table("decoding, medians", ("", "seconds", "tokens/s"), rows)
    print_facts("bench", {key: value for key, value in result.items() if not isinstance(value, dict)})


@with_options(BenchConfig, show)
def command(config: BenchConfig) -> Any:
    """Time greedy decoding against transformers, and s2t-local against greedy."""
    from s2t.bench import bench

    return bench(config)
