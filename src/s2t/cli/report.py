"""`s2t report`: one self-contained HTML page of an evaluated run, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from s2t.cli.options import with_options


@dataclass(frozen=True)
class ReportConfig:
    """`s2t report`."""

    run: str = "runs/eval"
    """Folder written by `s2t eval`."""
    out: str | None = None
    """Where the page goes; without it, into the run folder."""
    measure: str | None = None
    """Folder written by `s2t measure`, to draw its hit-rate curve."""
    note: str | None = None
    """A line of your own for the head of the page."""


def show(document: dict[str, str]) -> None:
    print(document["report"])


@with_options(ReportConfig, show)
def command(config: ReportConfig) -> Any:
    """Write one self-contained HTML page: scores, and every traced step with its candidates."""
    from s2t.report import write_report

    path = write_report(config.run, out=config.out, measure=config.measure, note=config.note)
    return {"report": str(path)}
