"""Write docs/api.md, the reference of the Python interface, from the docstrings themselves: `python docs/make_api.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import s2t
from s2t import api, records, workflows
from s2t.collect import read_groups

HEAD = """# Python

Written by `python docs/make_api.py` from the docstrings themselves; do not edit.

`import s2t` is instant; torch is imported with the first call. Every error that a user can cause is an `s2t.errors.S2TError` of
one line. Settings that are passed as keywords are those of the command line: [cli.md](cli.md).
"""
FUNCTIONS = [name for name in s2t.__all__ if callable(getattr(s2t, name))]
WORKFLOWS = ("measure", "calibrate", "collect", "train", "distill", "evaluate")
RECORDS = ("Step", "Candidates", "Cost", "SelectionGroup", "Provenance", "Problem", "Result")


def reference() -> str:
    """The whole page."""
    parts = [HEAD, "\n## Load and write\n"]
    parts += [entry(f"s2t.{name}", getattr(s2t, name)) for name in FUNCTIONS]
    parts += [entry("Reasoner", api.Reasoner), *methods(api.Reasoner), entry("Generation", api.Generation)]
    parts += ["\n## Workflows\n", paragraph(workflows)]
    parts += [entry(f"s2t.workflows.{name}", getattr(workflows, name)) for name in WORKFLOWS]
    parts += [entry("s2t.collect.read_groups", read_groups)]
    parts += ["\n## Records\n", paragraph(records), *(entry(name, getattr(records, name)) for name in RECORDS)]
    return "".join(parts)


def entry(name: str, what: Any) -> str:
    """Name, signature, docstring, and the fields of a record."""
    head = f"\n### {name}\n"
    if inspect.isclass(what):
        return head + paragraph(what) + (table(what) if dataclasses.is_dataclass(what) else "")
    return head + f"\n```python\n{name}{signature(what)}\n```\n" + paragraph(what)


def methods(cls: type) -> list[str]:
    """Public methods of a class."""
    found = inspect.getmembers(cls, inspect.isfunction)
    return [entry(f"{cls.__name__}.{name}", method) for name, method in found if not name.startswith("_")]


def signature(function: Any) -> str:
    """As it is written, without `self`; one line if it fits, else a line per parameter."""
    found = inspect.signature(function)
    kept = [p for name, p in found.parameters.items() if name != "self"]
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(found.replace(parameters=kept)))
    if len(text) < 100:
        return text
    inner, _, result = text[1:].rpartition(")")
    return "(\n    " + re.sub(r", (?=[\w*]+(?::|,|$|\)))", ",\n    ", inner) + ",\n)" + result


def paragraph(what: Any) -> str:
    """The docstring."""
    return f"\n{inspect.cleandoc(what.__doc__ or '')}\n"


def table(cls: Any) -> str:
    """One row per field of a dataclass."""
    rows = "".join(f"| `{f.name}` | `{str(f.type).replace('|', chr(92) + '|')}` |\n" for f in dataclasses.fields(cls))
    return f"\n| field | type |\n| --- | --- |\n{rows}"


if __name__ == "__main__":
    page = Path(__file__).with_name("api.md")
    page.write_text(reference(), encoding="utf-8")
    print(f"wrote {page}")
