"""What the metadata of an adapter may hold: values of the kinds of their defaults, and tasks by where problems come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from s2t.config import CRITICALITY_READINGS, SCOPES

_KNOWN = {"scope": SCOPES, "criticality": CRITICALITY_READINGS}
_LISTS = {"heldout_templates": str, "reserved_ids": int}


def check_kinds(data: Mapping[str, Any], default: Any) -> None:
    """Raise ValueError, naming the first of some values that is not of the kind of its default (a dataclass's field)."""
    for item in fields(default):
        if item.name in data and not _is_kind(item.name, data[item.name], getattr(default, item.name)):
            raise ValueError(f"{item.name} is {str(data[item.name])[:60]!r}")


def _is_kind(name: str, value: Any, default: Any) -> bool:
    if name in _LISTS:
        return isinstance(value, (list, tuple)) and all(type(item) is _LISTS[name] for item in value)
    if default is None:
        return True
    kinds = (int, float) if isinstance(default, float) else type(default)
    is_kind = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
    return is_kind and value in _KNOWN.get(name, (value,))


def is_same_source(one: str, other: str) -> bool:
    """Whether two tasks take their problems, and so their templates, from the same place: they are alike but for options."""
    return one.partition(",")[0] == other.partition(",")[0]
