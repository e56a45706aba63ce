"""`s2t measure`: local sufficiency of a pair of models, printed as a hit-rate curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import percent, percent_interval, print_facts, print_table
from s2t.config import MeasureConfig

BAND_KS = ("1", "2", "4", "8", "16")


def show(measured: Mapping[str, Any]) -> None:
    print_facts("measure", measured)
    intervals = measured.get("hit_rate_ci95", {})
    print_table(
        "LLM's top token among the SLM's first K, at divergence points",
        ("K", "hit rate %", "95 % interval"),
        [(k, percent(rate), percent_interval(intervals.get(k))) for k, rate in measured.get("hit_rate", {}).items()],
    )
    _show_bands(measured.get("hit_rate_by_divergence", []))


@with_options(MeasureConfig, show)
def command(config: MeasureConfig) -> Any:
    """Measure how often the LLM's token is among the SLM's first K where the two disagree."""
    from s2t.measure import measure

    return measure(config)


def _show_bands(bands: list[Mapping[str, Any]]) -> None:
    if not bands:
        return
    ks = list(bands[0]["hit_rate"])
    ks = [k for k in ks if k in BAND_KS]
    rows = [(_band_name(band), band["num_steps"], *(percent(band["hit_rate"].get(k)) for k in ks)) for band in bands]
    print_table("Hit rate by divergence (nats)", ("divergence", "steps", *(f"hit@{k} %" for k in ks)), rows)


def _band_name(band: Mapping[str, Any]) -> str:
    high = band.get("high")
    return f"{band['low']:.3g} and more" if high is None else f"{band['low']:.3g} to {high:.3g}"
