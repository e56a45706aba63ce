"""What an answer is made of: formulas, lists, tuples, intervals, relations. Plain data; it knows neither text nor values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NAME = re.compile(
    r"(?:\\angle\s*)?(?:\\text\s*\{[A-Za-z ]*\}|\\[a-z]+(?=[_ ({=]|$)|[A-Za-z]+(?:\s[A-Z])*)(?:_(?:\{[^{}]*\}|\w))?'*"
    r"(?:\s*\([A-Za-z0-9, ]*\))?"
)
_NO_NAME = re.compile(r"\\(?:pi|infty|frac|sqrt|pm)")


@dataclass(frozen=True)
class Leaf:
    """A formula, or words; with its value where it is a plain number."""

    text: str


@dataclass(frozen=True)
class Items:
    """Several values: a list (in any order), a tuple, or the rows of a matrix."""

    kind: str
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Interval:
    """The numbers between two bounds, each of which belongs to it or not."""

    low: Node
    high: Node
    is_low_open: bool
    is_high_open: bool


@dataclass(frozen=True)
class Union:
    """Intervals and points together; without parts it is empty."""

    parts: tuple[Node, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Relation:
    """Two sides and the sign between them."""

    left: str
    sign: str
    right: str
    value: Node
    """The right side, read."""


@dataclass(frozen=True)
class Either:
    """One value in several forms, such as exactly and about."""

    forms: tuple[Node, ...]


Node = Leaf | Items | Interval | Union | Relation | Either
INFINITY, MINUS_INFINITY = Leaf("\\infty"), Leaf("-\\infty")


def is_name(text: str) -> bool:
    """Whether a side of an equation only names its value: "x", "f(x)", "m_{max}"."""
    return _NAME.fullmatch(text.strip()) is not None and not _NO_NAME.match(text.strip())


def leaves(node: Node) -> list[str]:
    """The formulas that a value is made of."""
    if isinstance(node, Leaf):
        return [node.text]
    if isinstance(node, Relation):
        return [*([] if is_name(node.left) else [node.left]), *leaves(node.value)]
    parts: tuple[Node, ...] = ()
    if isinstance(node, Items):
        parts = node.items
    elif isinstance(node, Interval):
        parts = (node.low, node.high)
    elif isinstance(node, Union):
        parts = node.parts
    else:
        parts = node.forms
    return [text for part in parts for text in leaves(part)] or ["0"]
