"""`s2t demo`: the whole method on the embedded pair, offline and on a CPU, from measuring to the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from s2t.cli.evaluate import print_all, print_brief
from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.errors import ConfigError


@dataclass(frozen=True)
class DemoConfig:
    """`s2t demo`."""

    out: str = "runs/demo"
    """Folder of the demo; rerunning resumes it."""
    seed: int = 0
    """Seed of problems and training."""
    limit: int | None = None
    """Number of test problems; fewer is quicker and says less."""
    train_problems: int | None = None
    """Number of problems the selector is trained on."""

    def __post_init__(self) -> None:
        for name in ("limit", "train_problems"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}.")


def show(summary: Mapping[str, Any], config: DemoConfig, everything: bool) -> None:
    if "strategies" not in summary:
        print_facts("demo", summary)
    elif everything:
        print_all(summary)
        print_facts("demo", summary)
    else:
        print_brief(summary, f"All tables: --all; pictures and traces: {config.out}/report.html")


@with_options(DemoConfig, show)
def command(
    config: DemoConfig,
    everything: Annotated[
        bool, typer.Option("--all", help="Print every table: costs, triggers, all paired tests, templates.")
    ] = False,
) -> Any:
    """Run measure, calibrate, collect, train, eval and report on the embedded pair."""
    from s2t.demo import demo

    return demo(out=config.out, seed=config.seed, limit=config.limit, groups=config.train_problems)
