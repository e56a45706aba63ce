"""Write docs/cli.md, the reference of every command, from the commands themselves: `python docs/make_cli.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer

from s2t.cli.main import build_app

HEAD = """# Command line

Written by `python docs/make_cli.py` from the commands themselves; do not edit.

Every command takes a JSON file of settings (`--config`, also a run's `manifest.json`; a flag goes before it), prints one JSON
document with `--json`, and ends with 0 (done), 1 (failure), 2 (a mistake in use, one line on stderr) or 130 (interrupted).
"""


def reference() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(build_app())
    return HEAD + "".join(section(name, command) for name, command in group.commands.items())


def section(name: str, command: Any) -> str:
    """Usage, what the command does, and one row per option."""
    arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in COMMON]
    usage = " ".join(["s2t", name, *arguments, "[OPTIONS]"])
    rows = "".join(f"| `{' / '.join(o.opts)}` | {what(o)} | {default(o)} |\n" for o in options)
    text = inspect.cleandoc(command.help or "")
    return f"\n## s2t {name}\n\n`{usage}`\n\n{text}\n\n| option | what | default |\n| --- | --- | --- |\n{rows}"


COMMON = ("config_file", "as_json", "debug", "help")
DEFAULT = re.compile(r"\s*\\?\[default: (.*?)\]")


def what(option: Any) -> str:
    """The option's help without its default, which has a column of its own."""
    return DEFAULT.sub("", " ".join((option.help or "").split())).replace("\\[", "[").replace("|", "\\|")


def default(option: Any) -> str:
    """What applies when the option is not given."""
    found = DEFAULT.search(" ".join((option.help or "").split()))
    return f"`{found.group(1)}`" if found else ""


if __name__ == "__main__":
    page = Path(__file__).with_name("cli.md")
    page.write_text(reference(), encoding="utf-8")
    print(f"wrote {page}")
