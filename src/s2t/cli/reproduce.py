"""`s2t reproduce RECIPE`: a chain of commands from one file, resumable, and its numbers beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from s2t.cli.options import with_options
from s2t.cli.output import print_table
from s2t.config import ReproduceConfig


def show(found: Mapping[str, Any]) -> None:
    if "rows" not in found:
        print("\n".join(found["commands"]))
        return
    from s2t.reproduce import cells

    print_table(found["title"], tuple(found["columns"]), [cells(row) for row in found["rows"]])


@with_options(ReproduceConfig, show)
def command(
    config: ReproduceConfig,
    file: Annotated[str, typer.Argument(help="TOML file with the stages; the project's own are in recipes/.")] = "",
) -> Any:
    """Run a recipe, stage by stage, and print what was measured beside what was published."""
    from s2t.reproduce import reproduce as run

    return run(replace(config, recipe=file) if file else config)
