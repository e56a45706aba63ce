"""What commands print: one JSON document, or small tables; stdout only, since progress goes to stderr.

Knows the shape of numbers, not what they mean.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

PIPE_WIDTH = 160


def json_text(document: Any) -> str:
    """The document as strict JSON: dataclasses and paths are taken in, NaN and infinity become null."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], gap: int = 2) -> None:
    """One table with the first column to the left and the others, numbers mostly, to the right; nothing is cut off.

    A row of one cell is the title of the rows below it. Columns are `gap` characters apart.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
    )
    for index, name in enumerate(columns):
        header = "\n".join(name.rsplit(" ", 1)) if index else name  # narrow columns: numbers must fit 80 characters
        table.add_column(header, justify="right" if index else "left", overflow="fold")
    for row in rows:
        if len(row) == 1:  # the title of a part
            table.add_section()
        table.add_row(*(number(value) for value in row), style="bold" if len(row) == 1 else None)
    _print(table)


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """The plain values of a mapping as a table of two columns; nested values are left to --json."""
    rows = [
        (key.replace("_", " "), value) for key, value in facts.items() if not isinstance(value, (Mapping, list, tuple))
    ]
    if rows:
        print_table(title, ("", "value"), rows)


def number(value: Any) -> str:
    """A short form of any cell: 1,234 or 0.0123 or 1.2e+09; a dash where there is nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def short(count: float | None) -> str:
    """A count in four characters: 340, 1.2k, 34k, 340k, 1.2M; a dash where there is nothing."""
    if count is None:
        return "–"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            scaled = count / size
            return f"{scaled:.1f}{suffix}" if scaled < 9.95 else f"{scaled:.0f}{suffix}"
    return f"{count:.0f}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent with one decimal."""
    return "–" if share is None else f"{100 * share:.1f}"


def p_value(p: float | None) -> str:
    """A p-value with three decimals, or `<0.001`."""
    return "–" if p is None else "<0.001" if p < 0.0005 else f"{p:.3f}"


def percent_interval(bounds: Sequence[float] | None) -> str:
    """An interval of shares, e.g. `41.0 to 47.5`."""
    return "–" if not bounds else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def _print(renderable: Any) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    Console(file=sys.stdout, width=width, highlight=False, markup=False).print(renderable)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
