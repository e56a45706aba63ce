"""`s2t study NAME`: the registry, and what every study writes: study.json, table.md and picture.png."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from s2t.config import StudyConfig
from s2t.errors import ConfigError
from s2t.files import write_bytes, write_json, write_text
from s2t.report.chart import draw_charts
from s2t.studies import adapters, baselines, critical, data, distillation, knowledge, pairs, rivals, slips, triggers
from s2t.studies.lab import Findings, Lab, open_run

STUDIES: dict[str, Callable[[Lab], Findings]] = {
    "baselines": baselines.baselines,
    "sufficiency": pairs.sufficiency,
    "positions": pairs.positions,
    "scaling": pairs.scaling,
    "triggers": triggers.triggers,
    "criticality": triggers.criticality,
    "candidates": triggers.candidates,
    "training": adapters.training,
    "size": adapters.size,
    "transfer": adapters.transfer,
    "distillation": distillation.distillation,
    "knowledge": knowledge.knowledge,
    "slips": slips.slips,
    "data": data.data,
    "critical": critical.critical,
    "rivals": rivals.rivals,
}


def study(config: StudyConfig) -> dict[str, Any]:
    """Run a study and return study.json; writes table.md and picture.png beside it. Same command again: goes on from there."""
    if config.name not in STUDIES:
        raise ConfigError(f"study must be one of {', '.join(STUDIES)}; got {config.name!r}.")
    run = open_run(config)
    found = STUDIES[config.name](Lab(config))
    result = {"name": config.name, **asdict(found)}
    write_json(run.file("study.json"), result)
    write_text(run.file("table.md"), markdown(found))
    charts = found.chart if isinstance(found.chart, list) else [found.chart]
    write_bytes(run.file("picture.png"), draw_charts([asdict(chart) for chart in charts]))
    run.finish()
    return result


def markdown(found: Findings) -> str:
    """The table with its title and notes as Markdown."""
    lines = [f"**{found.title}**", "", _line(found.columns), _line(["---"] * len(found.columns))]
    lines += [_line([cell(name, value) for name, value in zip(found.columns, row, strict=True)]) for row in found.rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in found.notes)]) + "\n"


def cell(column: str, value: Any) -> str:
    """A value as text: shares under a `%` column as per cent, intervals as `a to b`, small p-values as <0.001."""
    if value is None:
        return "–"
    if isinstance(value, (list, tuple)):
        return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"
    if column.endswith("%"):
        return f"{100 * value:.1f}"
    if column.split(" of ", maxsplit=1)[0] in ("p", "p (Holm)"):
        return "<0.001" if value < 0.0005 else f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
