"""A recipe: a chain of the ordinary workflows in one TOML file, checked as a whole, then run stage by stage and resumed.

    title = "..."
    [settings]                 # of every stage that knows them
    slm = "Qwen/Qwen2.5-1.5B-Instruct"
    [[stage]]
    name = "calibrate"         # the stage's folder below --out
    command = "calibrate"
    run = "@measure"           # @NAME: the folder of the stage of that name
    [[stage]]
    name = "gsm8k"
    command = "eval"
    published = { greedy = 72.1 }   # per cent, shown beside what was measured

Every setting of every stage is checked before the first one starts: a slip in the last stage costs seconds, not a day.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from s2t.config import ReproduceConfig, build_config, parse_override, read_as
from s2t.errors import ConfigError
from s2t.files import RunFolder, write_json, write_text
from s2t.workflows import WORKFLOWS, Stage

CONFIGS = {name: workflow.config for name, workflow in WORKFLOWS.items() if workflow.is_stage}
_OWN = ("name", "command", "published")
_COLUMNS = ("stage", "what", "n", "measured %", "95 %", "published %")


def reproduce(config: ReproduceConfig) -> dict[str, Any]:
    """Run a recipe and return its table: what was measured beside what was published; also reproduce.json and table.md.

    Stages that are finished are read, so the same command goes on where it was killed. With `dry_run` nothing runs.
    """
    title, stages = read_recipe(config.recipe, config.out, config.override)
    if config.dry_run:
        return {"title": title, "commands": [stage.line for stage in stages]}
    run = RunFolder.open(config.out, "reproduce", config, ignore=("dry_run",))
    rows = []
    for stage in stages:
        rows += _rows(stage, stage.run())
    result = {"title": title, "columns": _COLUMNS, "rows": rows, "commands": [stage.line for stage in stages]}
    write_json(run.file("reproduce.json"), result)
    write_text(run.file("table.md"), _markdown(title, rows))
    run.finish()
    return result


def read_recipe(path: str, out: str, override: Sequence[str] = ()) -> tuple[str, list[Stage]]:
    """Title and stages of a recipe with their folders below `out`; ConfigError, one line, for anything that would fail."""
    recipe = _load(path)
    changed = dict(map(parse_override, override))
    shared = recipe.get("settings", {})
    listed = recipe.get("stage", [])
    if not isinstance(shared, dict):
        raise ConfigError(f"recipe {path} needs [settings] to be a table; got {str(shared)[:60]}.")
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(stage, dict) and {"name", "command"} <= stage.keys() for stage in listed)
    ):
        raise ConfigError(f"recipe {path} needs [[stage]] tables, each with a name and a command.")
    names = [str(stage["name"]) for stage in listed]
    given = {key for stage in listed for key in stage} | set(shared)
    shared |= {key: value for key, value in changed.items() if key not in given}
    stages: list[Stage] = []
    for place, (name, stage) in enumerate(zip(names, listed, strict=True)):
        if name in names[:place]:
            raise ConfigError(f"recipe {path} has two stages named {name}; give each a name of its own.")
        stages.append(_stage(stage, shared, changed, Path(out), names[:place]))
    known = {item.name for stage in stages for item in fields(CONFIGS[stage.command])}
    if unknown := sorted(set(shared) - known):
        raise ConfigError(f"recipe {path}: no stage has a setting {', '.join(unknown)}; see docs/cli.md.")
    return str(recipe.get("title", Path(path).stem)), stages


def _load(path: str) -> dict[str, Any]:
    if not path:
        raise ConfigError("reproduce needs a recipe; pass a .toml file, such as one of recipes/.")
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}; pass a .toml file of recipes/.") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, or nothing that a file can be called
        raise ConfigError(f"recipe {path} is not TOML: {error}.") from error


def _stage(
    stage: Mapping[str, Any], shared: Mapping[str, Any], changed: Mapping[str, str], out: Path, before: Sequence[str]
) -> Stage:
    name, command = str(stage["name"]), str(stage["command"])
    if command not in CONFIGS:
        raise ConfigError(f"stage {name}: command must be one of {', '.join(CONFIGS)}; got {command!r}.")
    known = {item.name for item in fields(CONFIGS[command])}
    own = {key: value for key, value in stage.items() if key not in _OWN}
    given = {key: value for key, value in shared.items() if key in known} | own
    changed = {key: value for key, value in changed.items() if key in given and not _is_stage(given[key])}
    given |= {key: read_as(CONFIGS[command], key, value) for key, value in changed.items() if key in known}
    settings = {key: _folder(name, value, out, before) for key, value in given.items()} | {"out": str(out / name)}
    try:
        build_config(CONFIGS[command], flags=settings)
    except ConfigError as error:
        raise ConfigError(f"stage {name}: {error}") from error
    published = stage.get("published", {})
    if not isinstance(published, dict) or not all(type(value) in (int, float) for value in published.values()):
        raise ConfigError(f"stage {name}: published must be a table of numbers in per cent; got {str(published)[:60]}.")
    return Stage(name, command, settings, dict(published))


def _is_stage(value: Any) -> bool:
    """Whether a setting names what an earlier stage wrote, which no override may replace: it would be another experiment."""
    return isinstance(value, str) and value.startswith("@")


def _folder(name: str, value: Any, out: Path, before: Sequence[str]) -> Any:
    """A text with every @NAME as the folder of an earlier stage; other values as they are."""
    if not _is_stage(value):
        return value
    folders = []
    for part in value.split(","):
        first, *rest = part.strip().removeprefix("@").split("/")
        if first not in before:
            raise ConfigError(
                f"stage {name}: {part.strip()} is no earlier stage; there are {', '.join(before) or 'none'}."
            )
        folders.append(str(Path(out, first, *rest)))
    return ",".join(folders)


def _rows(stage: Stage, result: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What a stage measured: accuracies by strategy, or hit rates; nothing for the others."""
    if stage.command == "eval":
        scores = result["strategies"].items()
        found = [(name, one["num_problems"], one["accuracy"], tuple(one["ci95"])) for name, one in scores]
    elif stage.command == "measure" and stage.settings.get("split") == "test":
        rates, intervals, count = result["hit_rate"], result["hit_rate_ci95"], result["num_divergence_points"]
        found = [(f"hit@{k}", count, rate, tuple(intervals[k])) for k, rate in rates.items()]
    else:
        return []
    return [(stage.name, *row, stage.published.get(row[0])) for row in found]


def _markdown(title: str, rows: Sequence[tuple[Any, ...]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(_COLUMNS)} |", "| --- | --- | --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows)]) + "\n"


def cells(row: Sequence[Any]) -> list[str]:
    """A row of the table as text."""
    stage, what, count, value, interval, published = row
    low, high = interval
    shown = "–" if published is None else f"{published:.1f}"
    return [stage, what, f"{count:,}", f"{100 * value:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", shown]
