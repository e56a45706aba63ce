"""`s2t study NAME`: one question, one table, one picture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from s2t.cli.options import with_options
from s2t.cli.output import print_table
from s2t.config import StudyConfig


def show(found: Mapping[str, Any]) -> None:
    from s2t.studies.run import cell

    if "studies" in found:
        print_table("s2t study NAME", ("name", "what it asks"), list(found["studies"].items()))
        return

    columns = tuple(found["columns"])
    rows = [[cell(name, value) for name, value in zip(columns, row, strict=True)] for row in found["rows"]]
    print_table(str(found["title"]), columns, rows)
    for note in found["notes"]:
        print(f"- {note}")


@with_options(StudyConfig, show)
def command(
    config: StudyConfig,
    study: Annotated[str, typer.Argument(help="baselines, sufficiency, positions, scaling, triggers, criticality, candidates, "
    "training, size, transfer, distillation, knowledge, slips, data, critical or rivals.")] = "",
) -> Any:  # fmt: skip
    """Answer one question about a pair or a selector: a table and a picture, from runs that resume."""
    from s2t.studies import STUDIES
    from s2t.studies import study as run

    name = study or config.name
    if not name:
        return {"studies": {known: _question(function) for known, function in STUDIES.items()}}
    return run(replace(config, name=name))


def _question(function: Any) -> str:
    """What a study asks: the first line of its own description."""
    return (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
