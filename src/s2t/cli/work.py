"""The commands of the table of workflows (all but eval, which has a page of its own), and what each prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from s2t.cli.options import with_options
from s2t.cli.output import percent, percent_interval, print_facts, print_table
from s2t.config import BenchConfig, MeasureConfig
from s2t.workflows import WORKFLOWS

BAND_KS = ("1", "2", "4", "8", "16")


def command_of(name: str, show: Callable[..., None]) -> Callable[..., None]:
    """The command of a workflow: its settings become options, its result goes to `show`."""
    workflow = WORKFLOWS[name]

    def command(config: Any) -> Any:
        done = workflow.start(config)
        if workflow.is_shared:
            from s2t.train.processes import is_first_process

            return done if is_first_process() else None
        return done

    command.__doc__ = workflow.about
    return with_options(workflow.config, show)(command)


_FEW = 50  # problems


def show_measured(measured: Mapping[str, Any], config: MeasureConfig) -> None:
    print_facts("measure", measured)
    intervals = measured.get("hit_rate_ci95", {})
    print_table(
        "LLM's top token among the SLM's first K, at divergence points",
        ("K", "hit rate %", "95 % interval"),
        [(k, percent(rate), percent_interval(intervals.get(k))) for k, rate in measured.get("hit_rate", {}).items()],
    )
    _show_bands(measured.get("hit_rate_by_divergence", []))
    if measured.get("num_problems", _FEW) < _FEW:
        print(f"{measured['num_problems']} problems are a first look: their intervals are too narrow to be trusted.")
    if config.split == "calibration":
        print(f"Next: s2t calibrate --run {config.out}")


def show_calibration(calibration: Mapping[str, Any]) -> None:
    print_table("thresholds", ("trigger", "threshold (nats)"), calibration.get("thresholds", {}).items())
    print_facts("calibrate", calibration)


def show_collected(collected: Mapping[str, Any]) -> None:
    shards = collected.get("shards")
    facts = {**collected, "shards": len(shards) if isinstance(shards, (list, tuple)) else shards}
    print_facts("collect", facts)


def show_trained(trained: Mapping[str, Any]) -> None:
    print_facts("train", trained)
    if trained.get("trigger_rate") == 0:
        print(
            "warning: the adapter never triggers on its own training problems, so that s2t-local would write what greedy writes; "
            "train longer, or at a higher --learning-rate.",
            file=sys.stderr,
        )


def show_router(trained: Mapping[str, Any]) -> None:
    print_facts("train-router", trained)


def show_distilled(distilled: Mapping[str, Any]) -> None:
    print_facts("distill", {**distilled, "final loss, nats per token": distilled["final"]["loss"]})


def show_merged(merged: Mapping[str, Any]) -> None:
    adapter = merged["adapter"]
    facts = {"folder": merged["folder"], "base model": adapter["base_model"], "scope": adapter["scope"]}
    print_facts("merge", facts | {"dtype": merged["dtype"], "weights files": len(merged["weights"])})
    if adapter["scope"] != "always":
        print(
            f"Plain generate of transformers writes what the base model writes; to select: model.generate(..., "
            f"custom_generate={merged['folder']!r}, trust_remote_code=True), or --slm {merged['folder']}"
        )


def show_exported(exported: Mapping[str, Any]) -> None:
    adapter = exported["adapter"]
    facts = {"folder": exported["folder"], "base model": adapter["base_model"], "scope": adapter["scope"]}
    facts |= {"quantization": exported["dtype"], "criticality above": adapter["thresholds"].get("criticality")}
    print_facts("export", facts)


def show_pushed(pushed: Mapping[str, Any]) -> None:
    seen = "private" if pushed["private"] else "public"
    print_facts("push", {"repository": pushed["url"], "seen by": seen, "files": len(pushed["files"])})
    print(f"Load it with --adapter {pushed['repo']}")


def show_bench(result: Mapping[str, Any]) -> None:
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


@with_options(BenchConfig, show_bench)
def bench(
    config: BenchConfig,
    what: Annotated[str, typer.Argument(help="decode, collect, train or limit; the same as --work.")] = "",
) -> Any:
    return WORKFLOWS["bench"].start(replace(config, work=what or config.work))


bench.__doc__ = WORKFLOWS["bench"].about


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


COMMANDS = {
    "measure": command_of("measure", show_measured),
    "calibrate": command_of("calibrate", show_calibration),
    "collect": command_of("collect", show_collected),
    "train": command_of("train", show_trained),
    "train-router": command_of("train-router", show_router),
    "distill": command_of("distill", show_distilled),
    "merge": command_of("merge", show_merged),
    "export": command_of("export", show_exported),
    "push": command_of("push", show_pushed),
    "bench": bench,
}
