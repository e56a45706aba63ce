"""The fields of a dataset's rows, each of the kind that its use needs: a wrong one is one line that says where it stands.

Knows JSON's kinds and no tasks.
"""

from __future__ import annotations

import keyword
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from s2t.errors import DataError
from s2t.files import iter_jsonl

Row = tuple[str, dict[str, Any]]  # where the row stands (file:line), and its fields
_SHOWN_NAMES, _SHOWN = 20, 60


def read_rows(path: Path) -> list[Row]:
    """The objects of a JSONL file, each with its file:line; DataError for a line that is none, or that cannot be parsed."""
    rows: list[Row] = []
    try:
        rows.extend(iter_jsonl(path))
    except (
        ValueError,
        RecursionError,
        MemoryError,
    ) as error:  # what a parser throws at numbers and nesting without end
        read = _count_read(path)
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise DataError(f"{path}:{read} cannot be read as JSON: {reason}; fix that line.") from error
    return rows


def _count_read(path: Path) -> int:
    """The number of the first line that cannot be parsed."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (OSError, ValueError):
        return 1
    return next((number for number, line in enumerate(lines, start=1) if not _is_parsed(line)), len(lines))


def _is_parsed(line: bytes) -> bool:
    import json

    try:
        return not line.strip() or json.loads(line) is not Ellipsis
    except (ValueError, RecursionError, MemoryError):
        return False


def text(values: dict[str, Any], name: str, where: str) -> str:
    """A field as text: a text, a number, or a list of them joined by commas; DataError when it is absent or another kind."""
    value = _present(values, name, where)
    if isinstance(value, list):
        return ", ".join(_plain(item, name, where) for item in value)
    return _plain(value, name, where)


def lines(values: dict[str, Any], name: str, where: str) -> str:
    """A field as text of several lines: a text, or a list of texts."""
    value = _present(values, name, where)
    found = value if isinstance(value, list) else [value]
    return "\n".join(_checked(item, name, where, "a text or a list of texts", _is_text) for item in found)


def identifier(values: dict[str, Any], name: str, where: str) -> str:
    """A field that holds the name of a Python function."""
    return _checked(_present(values, name, where), name, where, "the name of a function", _is_identifier)


def tolerance(values: dict[str, Any], name: str | None, where: str) -> float | None:
    """The absolute error that a field allows; None where none is stated."""
    value = None if name is None else values.get(name)
    if value is None or value == "":
        return None
    number = _number(value)
    if number is None or not 0 <= number < math.inf:
        raise _wrong(value, name or "", where, "a number from 0 on")
    return number


def choices(values: dict[str, Any], name: str, where: str) -> tuple[list[str], list[str] | None]:
    """The choices' texts, and their labels where the field has them."""
    found, labels = _present(values, name, where), None
    if isinstance(found, dict):
        found, labels = found.get("text"), found.get("label")
        if labels is not None and not (
            isinstance(labels, list) and isinstance(found, list) and len(labels) == len(found)
        ):
            raise _wrong(labels, name, where, "a mapping with one label for each text")
    if not isinstance(found, list):
        raise DataError(f"{where}: the choices in {name!r} must be a list of texts; map the field.")
    return [_plain(choice, name, where) for choice in found], labels and [
        _plain(label, name, where) for label in labels
    ]


def _present(values: dict[str, Any], name: str, where: str) -> Any:
    if name not in values or values[name] is None:
        raise DataError(f"{where} has no field {name!r}; it has {_names(values)}; map the field in the spec.")
    return values[name]


def _names(values: Iterable[str]) -> str:
    names = [name if name.isprintable() else ascii(name) for name in values]
    shown = [name[:_SHOWN] for name in names[:_SHOWN_NAMES]]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") if shown else "none"


def _plain(value: Any, name: str, where: str) -> str:
    """A text or a number as text; whole numbers without a point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_endless = isinstance(value, float) and not math.isfinite(value)
    is_plain = value is not None and not is_endless and not isinstance(value, (dict, list, bytes))
    return _checked(
        str(value) if is_plain else value, name, where, "a text, a number or a list of them", lambda _: is_plain
    )


def _checked(value: Any, name: str, where: str, wanted: str, is_right: Callable[[Any], bool]) -> str:
    if not is_right(value):
        raise _wrong(value, name, where, wanted)
    if not _is_unicode(value):
        raise DataError(f"{where}: the field {name!r} has half of a surrogate pair, which is no text; fix that line.")
    return value


def _wrong(value: Any, name: str, where: str, wanted: str) -> DataError:
    shown = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
    return DataError(
        f"{where}: the field {name!r} must be {wanted}; got {shown[:_SHOWN]}; fix that line or map another field."
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_identifier(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value)


def _is_unicode(value: str) -> bool:
    return not any("\ud800" <= sign <= "\udfff" for sign in value) if not value.isascii() else True


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
