"""`s2t bench`: decoding speed against transformers, and of selection against greedy, in one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from s2t.cli.options import with_options
from s2t.cli.output import print_facts, print_table
from s2t.config import BenchConfig


def show(result: Mapping[str, Any]) -> None:
    if result["work"] == "limit":
        _show_limit(result)
        return
    speeds = result.get("tokens_per_s") or result["groups_per_s"]
    unit = "tokens/s" if "tokens_per_s" in result else "groups/s"
    rows = [
        (name, value, speeds.get(name) if isinstance(speeds, dict) else speeds)
        for name, value in result["seconds"].items()
    ]
    print_table(f"{result['work']}, medians of {result['rounds']} rounds", ("", "seconds", unit), rows)
    print_facts("bench", {key: value for key, value in result.items() if not isinstance(value, dict)})
    ratios = {key: value for key, value in result.items() if "_to_" in key and isinstance(value, dict)}
    for key, values in ratios.items():
        print_table(key, ("trigger rate", "ratio"), list(values.items()))


def _show_limit(result: Mapping[str, Any]) -> None:
    rows = [
        (name, result["seconds"][name], result["per_s"][name], of) for name, of in result["time_to_products"].items()
    ]
    head = ("stage", "seconds", "tokens/s", "times its products")
    print_table(f"limit, medians of {result['rounds']} rounds; training counts groups", head, rows)
    print_table("s2t-local over greedy", ("batch", "time"), list(result["local_time_to_greedy"].items()))


@with_options(BenchConfig, show)
def command(
    config: BenchConfig,
    what: Annotated[str, typer.Argument(help="decode, collect, train or limit; the same as --work.")] = "",
) -> Any:
    """Time decoding, collecting or training, each against a baseline of the same run, or all against the hardware's limit."""
    from s2t.bench import bench

    return bench(replace(config, work=what or config.work))
