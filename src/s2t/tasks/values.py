r"""What an answer is: a number, a formula, a list, a tuple, an interval, a relation; and whether two of them are the same.

A list is all of its items, with their multiplicities; a formula is left to `same_formula`, which reads it whole or
not at all. Knows where no answer comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from s2t.tasks.numerals import is_unit, parse_number
from s2t.tasks.writing import bare, tidy

_MAX_ITEMS = 64
_SEPARATOR = re.compile(
    r"\s*[,;]?\s*(?:\\text\s*\{\s*[,;]?\s*(?:and|or)?\s*[,;]?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\lor(?![A-Za-z])"
    r"|\\land(?![A-Za-z])|,|;)\s*(?:\\text\s*\{\s*(?:and|or)\s*\})?\s*(?:(?:and|or)(?![A-Za-z]))?\s*"
)
_RELATIONS = {
    "=": "=", "\\approx": "~", "\\equiv": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in",
}  # fmt: skip
_RELATION = re.compile(r"\\(?:approx|equiv|le|ge|ne|in)(?![A-Za-z])|[=<>]")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "~": "~", "in": "in"}
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<=[)\]])\s*U\s*(?=[(\[])|(?<=[)\]])\s*union\s*(?=[(\[])")
_SET_MINUS = re.compile(r"\\setminus(?![A-Za-z])")
_REALS = re.compile(r"\\mathbb\{R\}|\(-\\infty\s*,\s*\+?\\infty\)|all real numbers|\\text\s*\{\s*all real numbers\s*\}")
_DOMAIN = re.compile(
    r"(?:\\text\s*\{[^{}]*\}|where|for|with|all|any|some|every|\s)*[A-Za-z]\s*(?:\\in\s*(?:\\mathbb\{[A-Z]\}|[ZNQR])(?:[_^]\{?[+*0]\}?)?"
    r"|(?:\\text\s*\{)?\s*(?:is|are)?\s*(?:an?|any|some|arbitrary|integers?|positive|natural|real|numbers?|constants?|\s)+\}?)"
)
_NAME = re.compile(
    r"(?:\\angle\s*)?(?:\\text\s*\{[A-Za-z ]*\}|\\[a-z]+(?=[_ ({=]|$)|[A-Za-z]+(?:\s[A-Z])*)(?:_(?:\{[^{}]*\}|\w))?'*"
    r"(?:\s*\([A-Za-z0-9, ]*\))?"
)
_NO_NAME = re.compile(r"\\(?:pi|infty|frac|sqrt|pm)")
_FRENCH = re.compile(r"\](?P<low>[^\[\]]+)[,;](?P<high>[^\[\]]+)\[")
_MATRIX = re.compile(r"\\begin\s*\{([a-z]*matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}")
_BASE = re.compile(r"\(?([0-9A-Z]+)\)?_\{?([0-9]+)\}?")
_CLOCK = re.compile(r"([0-9]{1,2}:[0-9]{2})(?:\s*(?:\\text\s*\{\s*)?[AaPp]\.?\s?[Mm]\.?\s*\}?)?")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_TRAILING_TEXT = re.compile(r"\s*\\text\s*\{([^{}0-9]*)\}(?:\^\{?-?[0-9]\}?)?$")
_WORDS = re.compile(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*")
_STRAY_LETTER = re.compile(r"[a-z](\([^()]*\]|\[[^\[\]]*\))")  # t(0,4] can only be an interval
_DEGREES_IN = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*([0-9]+)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?")
_TIGHT_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")

Same = Callable[[str, str], bool]


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
_INFINITY, _MINUS_INFINITY = Leaf("\\infty"), Leaf("-\\infty")


def read(text: str) -> Node:
    """The value that a whole answer states."""
    return _read(bare(tidy(text)), 0)


def is_same(gold: Node, answer: Node, same: Same) -> bool:
    """Whether two values are the same; `same` decides for two formulas or words."""
    return _Comparison(same).is_same(gold, answer)


def _read(text: str, depth: int) -> Node:
    text = bare(text)
    if depth > 12:
        return Leaf(text)
    if match := _STRAY_LETTER.fullmatch(text):
        text = match[1]
    text = _DEGREES_IN.sub(r"\1(\2\\pi/180)", text)
    parts, separators = split(text, _SEPARATOR)
    if len(parts) > 1 and not _TIGHT_THOUSANDS.fullmatch(text):
        return _list(text, parts, separators, depth)
    return _special(text, depth) or _relation(text, depth) or _bracketed(text, depth) or _leaf(text, depth)


def split(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between the matches that stand in no brackets, and those matches."""
    parts, found, depth, start, place = [], [], 0, 0, 0
    while place < len(text):
        sign = text[place]
        if depth <= 0 and (match := pattern.match(text, place)) and match.end() > place:
            parts.append(text[start:place])
            found.append(match[0])
            start = place = match.end()
            continue
        if sign == "\\":
            command = re.compile(r"\\(?:[A-Za-z]+|.)").match(text, place)
            word = command[0] if command else sign
            depth += word in ("\\{", "\\langle", "\\begin", "\\lfloor", "\\lceil")
            depth -= word in ("\\}", "\\rangle", "\\end", "\\rfloor", "\\rceil")
            place += len(word)
            continue
        depth += (sign in "([{") - (sign in ")]}")
        place += 1
    parts.append(text[start:])
    return parts, found


def _list(text: str, parts: list[str], separators: list[str], depth: int) -> Node:
    if not parts[0].strip() or not parts[-1].strip():
        return Leaf(text)  # something is missing
    parts, separators = _with_thousands(parts, separators)
    used = "".join(parts)
    kept = [part for part in parts if part.strip() and not _is_domain(part, used)]
    if len(kept) == 1:
        return _read(kept[0], depth + 1)
    if len(kept) > _MAX_ITEMS or not kept:
        return Leaf(", ".join(kept))
    items = [_read(part, depth + 1) for part in kept]
    if all(
        isinstance(item, (Interval, Union)) or (isinstance(item, Relation) and item.sign in "<=>=") for item in items
    ):
        joined = " ".join(separators)
        ranges = [_range(item) for item in items]
        if (
            "or" in joined
            or "lor" in joined
            or (all(isinstance(item, Interval) for item in items) and "and" not in joined)
        ):
            if all(found is not None for found in ranges):
                return _union([found for found in ranges if found is not None])
        elif ("and" in joined or "," in joined) and len(ranges) == 2 and (both := _intersection(*ranges)) is not None:
            return both
    flat = [
        inner for item in items for inner in (item.items if isinstance(item, Items) and item.kind == "list" else [item])
    ]
    return Items("list", tuple(_named_alike(flat)))


def _with_thousands(parts: list[str], separators: list[str]) -> tuple[list[str], list[str]]:
    r"""Commas within numbers, "1,200 and 1,300": those without a space where other separators have one."""
    if len(set(separators)) == 1:
        return parts, separators
    glued, marks = [parts[0]], []
    for mark, part in zip(separators, parts[1:], strict=True):
        if (
            mark == ","
            and re.fullmatch(r"[0-9]{3}(?:\.[0-9]+)?", part)
            and re.search(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})*$", glued[-1])
        ):
            glued[-1] += "," + part
        else:
            glued.append(part)
            marks.append(mark)
    return glued, marks


def _is_domain(part: str, used: str) -> bool:
    r"""Whether an item says only over what a letter runs: "k \in \mathbb{Z}"."""
    match = _DOMAIN.fullmatch(part.strip())
    return (
        match is not None and len(used) > len(part) and ("in" in part or "is" in part or "are" in part or "any" in part)
    )


def _named_alike(items: list[Node]) -> list[Node]:
    """With the name that only the first item has for all of them: "x = 1, 2, 3"."""
    first = items[0]
    if isinstance(first, Relation) and first.sign == "=" and not any(isinstance(item, Relation) for item in items[1:]):
        if is_name(first.left):
            return [first, *(Relation(first.left, "=", _written(item), item) for item in items[1:])]
    return items


def _written(node: Node) -> str:
    return node.text if isinstance(node, Leaf) else ""


def is_name(text: str) -> bool:
    """Whether a side of an equation only names its value: "x", "f(x)", "m_{max}"."""
    return _NAME.fullmatch(text.strip()) is not None and not _NO_NAME.match(text.strip())


def _special(text: str, depth: int) -> Node | None:
    """Unions, differences, the reals, the empty set, and both signs at once."""
    if _REALS.fullmatch(text):
        return Interval(_MINUS_INFINITY, _INFINITY, True, True)
    if text in ("\\emptyset", "\\{\\}"):
        return Union()
    outer, _ = split(text, _RELATION)
    if len(outer) == 1:
        for pattern in (_UNION, _SET_MINUS):
            parts, found = split(text, pattern)
            if found and all(part.strip() for part in parts):
                ranges = [_range(_read(part, depth + 1)) for part in parts]
                if any(part is None for part in ranges):
                    return Leaf(text)
                sets = [part for part in ranges if part is not None]
                return _union(sets) if pattern is _UNION else _difference(sets, text)
    if len(_PLUS_MINUS.findall(text)) == 1 and split(text, _PLUS_MINUS)[1]:
        upper = _PLUS_MINUS.sub(lambda sign: "+" if sign[1] == "pm" else "-", text)
        lower = _PLUS_MINUS.sub(lambda sign: "-" if sign[1] == "pm" else "+", text)
        return Items("list", tuple(_read(re.sub(r"(^|[=(])\s*\+", r"\1", side), depth + 1) for side in (upper, lower)))
    return None


def _relation(text: str, depth: int) -> Node | None:
    sides, signs = split(text, _RELATION)
    signs = [_RELATIONS[sign] for sign in signs]
    if not signs:
        return None
    if not sides[0].strip() and len(signs) == 1 and signs[0] in "=~":
        return _read(sides[1], depth + 1)
    if not all(side.strip() for side in sides):
        return Leaf(text)
    sides = [side.strip() for side in sides]
    if set(signs) <= {"=", "~"}:
        return _equation(sides, signs, depth)
    if len(signs) == 1:
        return Relation(sides[0], signs[0], sides[1], _read(sides[1], depth + 1))
    if len(signs) == 2 and is_name(sides[1]) and "!=" not in signs:
        return _between(sides, signs, depth) or Leaf(text)
    return Leaf(text)


def _equation(sides: list[str], signs: list[str], depth: int) -> Node:
    """A chain of equal sides is a name and its value, or only a value; what is about equal is another form of it."""
    if len(sides) == 2 and signs == ["="]:
        if is_name(sides[1]) and not is_name(sides[0]) and not re.search("[A-Za-z]", sides[0].replace("\\pi", "")):
            sides = [sides[1], sides[0]]
        if _is_tuple_name(sides[0]):
            return _read(sides[1], depth + 1)
        return Relation(sides[0], "=", sides[1], _read(sides[1], depth + 1))
    name = sides[0] if signs[0] == "=" and is_name(sides[0]) else None
    exact = [side for side, sign in zip(sides[1:], signs, strict=True) if sign == "="]
    about = [side for side, sign in zip(sides[1:], signs, strict=True) if sign == "~"]
    if not exact and not is_name(sides[0]):
        exact = [sides[0]]
    forms = [_read(side, depth + 1) for side in [*exact[-1:], *about[-1:]]]
    value = forms[0] if len(forms) == 1 else Either(tuple(forms))
    return value if name is None or about else Relation(name, "=", exact[-1], value)


def _is_tuple_name(side: str) -> bool:
    return re.fullmatch(r"\(\s*[A-Za-z](?:_\{?\w+\}?)?(?:\s*,\s*[A-Za-z](?:_\{?\w+\}?)?)+\s*\)", side) is not None


def _between(sides: list[str], signs: list[str], depth: int) -> Node | None:
    """The interval of "2 < x <= 5", whichever way the signs point."""
    if all(sign in ("<", "<=") for sign in signs):
        low, high, opens = sides[0], sides[2], [sign == "<" for sign in signs]
    elif all(sign in (">", ">=") for sign in signs):
        low, high, opens = sides[2], sides[0], [sign == ">" for sign in reversed(signs)]
    else:
        return None
    return Interval(_read(low, depth + 1), _read(high, depth + 1), *opens)


def _bracketed(text: str, depth: int) -> Node | None:
    if match := _FRENCH.fullmatch(text):
        return Interval(_read(match["low"], depth + 1), _read(match["high"], depth + 1), True, True)
    if match := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\cr(?![A-Za-z])", match[2]) if row.strip()]
        cells = [tuple(_read(cell, depth + 1) for cell in row.split("&")) for row in rows]
        return Items("matrix", tuple(Items("tuple", row) for row in cells))
    is_set = text.startswith("\\{") and text.endswith("\\}")
    is_angled = text.startswith("\\langle") and text.endswith("\\rangle")
    if not is_set and not is_angled and (text[:1] not in ("(", "[") or text[-1:] not in (")", "]")):
        return None
    inner = text[2:-2] if is_set else text[7:-7] if is_angled else text[1:-1]
    if not is_angled and not is_set and _closes_early(text):
        return None
    parts = [part.strip() for part in split(inner, re.compile("[,;]"))[0]]
    if not all(parts):
        return None
    items = tuple(_read(part, depth + 1) for part in parts)
    if is_set:
        return _flat_list(items)
    if len(items) == 1:
        return items[0] if text[0] + text[-1] in ("()", "[]") else None
    if len(items) == 2 and not is_angled and (text[0], text[-1]) != ("(", ")"):
        return Interval(*items, text[0] == "(", text[-1] == ")")
    is_matched = is_angled or text[0] + text[-1] in ("()", "[]")
    return Items("tuple", items) if is_matched else None


def _flat_list(items: tuple[Node, ...]) -> Node:
    flat = [
        inner for item in items for inner in (item.items if isinstance(item, Items) and item.kind == "list" else [item])
    ]
    return flat[0] if len(flat) == 1 else Items("list", tuple(flat))


def _closes_early(text: str) -> bool:
    """Whether the first bracket is closed before the end: "(1+x)(1-x)"."""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in "([{") - (sign in ")]}")
        if depth == 0:
            return place < len(text) - 1
    return True


def _leaf(text: str, depth: int) -> Node:
    match = _TRAILING_TEXT.search(text)
    cut = text[: match.start()] if match and is_unit(match[1]) else text
    if cut.strip() and cut != text:
        return _read(cut, depth + 1)
    if match := _CLOCK.fullmatch(text):
        return Leaf(match[1])
    return Leaf(text)


def _range(node: Node | None) -> Interval | Union | None:
    """The real numbers that a node stands for; None for one that is no such set."""
    if isinstance(node, (Interval, Union)):
        return node
    if isinstance(node, Items):
        if node.kind == "tuple" and len(node.items) == 2:
            return Interval(*node.items, True, True)
        return Union(tuple(_point(item) for item in node.items)) if node.kind == "list" else None
    if isinstance(node, Leaf):
        return _point(node) if node.text else None
    if not isinstance(node, Relation):
        return None
    if node.sign == "in":
        return _range(node.value)
    left, sign, right = node.left, node.sign, node.right
    if not is_name(left):
        left, sign, right = right, _FLIPPED[sign], left
    if not is_name(left):
        return None
    bound = _read(right, 6)
    if sign in ("<", "<="):
        return Interval(_MINUS_INFINITY, bound, True, sign == "<")
    if sign in (">", ">="):
        return Interval(bound, _INFINITY, sign == ">", True)
    if sign == "!=":
        return Union((Interval(_MINUS_INFINITY, bound, True, True), Interval(bound, _INFINITY, True, True)))
    return None


def _point(node: Node) -> Interval:
    return Interval(node, node, False, False)


def _union(sets: Sequence[Interval | Union]) -> Interval | Union:
    parts = [part for one in sets for part in (one.parts if isinstance(one, Union) else (one,))]
    return parts[0] if len(parts) == 1 and isinstance(parts[0], Interval) else Union(tuple(parts))


def _difference(sets: list[Interval | Union], text: str) -> Node:
    """The reals without points: the gaps between them."""
    whole, *taken = sets
    points = [part for one in taken for part in (one.parts if isinstance(one, Union) else (one,))]
    keys = [_number(part.low) if isinstance(part, Interval) and part.low == part.high else None for part in points]
    if whole != Interval(_MINUS_INFINITY, _INFINITY, True, True) or any(key is None for key in keys):
        return Leaf(text)
    ordered = [part.low for _, part in sorted(zip(keys, points, strict=True), key=lambda pair: pair[0] or 0)]  # type: ignore[union-attr]
    bounds = [_MINUS_INFINITY, *ordered, _INFINITY]
    return _union([Interval(low, high, True, True) for low, high in pairwise(bounds)])


def _intersection(one: Interval | Union | None, other: Interval | Union | None) -> Interval | None:
    """Of two rays that face each other: "x > 1 and x < 2"."""
    if not isinstance(one, Interval) or not isinstance(other, Interval):
        return None
    for up, down in ((one, other), (other, one)):
        if up.high == _INFINITY and down.low == _MINUS_INFINITY:
            return Interval(up.low, down.high, up.is_low_open, down.is_high_open)
    return None


def _number(node: Node) -> Fraction | None:
    return parse_number(node.text) if isinstance(node, Leaf) else None


class _Comparison:
    """One comparison; it asks for at most so many pairs of formulas."""

    def __init__(self, same: Same) -> None:
        self._same = same

    def is_same(self, gold: Node, answer: Node) -> bool:
        if gold == answer:
            return True
        for one, other in ((gold, answer), (answer, gold)):
            if isinstance(one, Either):
                return any(self.is_same(form, other) for form in one.forms)
        if isinstance(gold, Leaf) and isinstance(answer, Leaf):
            return self._same(gold.text, answer.text)
        if isinstance(gold, Relation) or isinstance(answer, Relation):
            return self._related(gold, answer)
        if isinstance(gold, (Interval, Union)) or isinstance(answer, (Interval, Union)):
            return self._ranges(_range_of(gold), _range_of(answer))
        if isinstance(gold, Items) and isinstance(answer, Items):
            return self._items(gold, answer)
        return False

    def _items(self, gold: Items, answer: Items) -> bool:
        if len(gold.items) != len(answer.items) or (gold.kind == "matrix") != (answer.kind == "matrix"):
            return False
        if gold.kind == "list" and not (self._has_own_names(gold) and not self._has_own_names(answer)):
            return self._matches(gold.items, answer.items)
        return all(self.is_same(*pair) for pair in zip(gold.items, answer.items, strict=True))

    @staticmethod
    def _has_own_names(items: Items) -> bool:
        """Whether every item names another quantity, "x = 1, y = 2": then bare values come in that order."""
        names = [
            item.left for item in items.items if isinstance(item, Relation) and item.sign == "=" and is_name(item.left)
        ]
        return len(names) == len(items.items) == len(set(names))

    def _matches(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        """Whether each item of one is one of the other's, and every item is used once."""
        left = list(answer)
        for item in gold:
            found = next((other for other in left if self.is_same(item, other)), None)
            if found is None:
                return False
            left.remove(found)
        return not left

    def _ranges(self, gold: Interval | Union | None, answer: Interval | Union | None) -> bool:
        if isinstance(gold, Interval) and isinstance(answer, Interval):
            edges = (gold.is_low_open, gold.is_high_open) == (answer.is_low_open, answer.is_high_open)
            return edges and self.is_same(gold.low, answer.low) and self.is_same(gold.high, answer.high)
        if isinstance(gold, Union) and isinstance(answer, Union):
            return len(gold.parts) == len(answer.parts) and self._matches(gold.parts, answer.parts)
        return False

    def _related(self, gold: Node, answer: Node) -> bool:
        if isinstance(gold, Relation) and isinstance(answer, Relation):
            if "in" in (gold.sign, answer.sign):
                return self.is_same(_member(gold), _member(answer))
            return self._relations(gold, answer)
        related, other = (gold, answer) if isinstance(gold, Relation) else (answer, gold)
        assert isinstance(related, Relation)
        if related.sign == "in" or (related.sign == "=" and is_name(related.left)):
            return self.is_same(related.value, other)
        if related.sign == "=":  # a chain that computes: 9 * 2 = 18
            return not re.search(r"(?<![\\A-Za-z])[A-Za-z]", related.left) and self.is_same(related.value, other)
        if isinstance(other, (Interval, Union)) or (isinstance(other, Items) and len(other.items) == 2):
            return self._ranges(_range(related), _range_of(other))
        return False

    def _relations(self, gold: Relation, answer: Relation) -> bool:
        if gold.sign == answer.sign == "=" and is_name(gold.left) and is_name(answer.left):
            value = _under_name(answer, gold.left)
            return value is not None and self.is_same(gold.value, value)
        ways = (answer, Relation(answer.right, _FLIPPED[answer.sign], answer.left, Leaf(answer.left)))
        for way in ways:
            if (
                way.sign == gold.sign
                and self.is_same(Leaf(gold.left), Leaf(way.left))
                and self.is_same(Leaf(gold.right), Leaf(way.right))
            ):
                return True
        return any(way.sign == gold.sign and self._same(_sides(gold), _sides(way)) for way in ways)


def _member(relation: Relation) -> Node:
    return relation.value if relation.sign == "in" else _range(relation) or relation


def _range_of(node: Node) -> Interval | Union | None:
    return _range(node) if isinstance(node, (Interval, Union, Items)) else None


def _under_name(relation: Relation, name: str) -> Node | None:
    """The value of a relation where its name is the other one: as it is, or of a function of another letter."""
    ours, theirs = (re.sub(r"[\s{}]", "", side) for side in (relation.left, name))
    bare_names = [re.sub(r"_[^_(']*", "", side) for side in (ours, theirs)]
    if ours == theirs or (bare_names[0] == bare_names[1] and len(set(bare_names) & {ours, theirs}) == 1):
        return relation.value
    functions = [re.fullmatch(r"([^()]+)\(([A-Za-z])\)", side) for side in (ours, theirs)]
    if None not in functions and functions[0][1] == functions[1][1]:  # type: ignore[index]
        old, new = functions[0][2], functions[1][2]  # type: ignore[index]
        if re.search(rf"(?<![A-Za-z\\]){new}(?![A-Za-z])", relation.right):
            return None
        return _read(re.sub(rf"(?<![A-Za-z\\]){old}(?![A-Za-z])", new, relation.right), 6)
    is_y = [side == "y" for side in (ours, theirs)]
    return relation.value if any(is_y) and any(functions) else None


def _sides(relation: Relation) -> str:
    """Both sides in one text, for a comparison up to a factor."""
    return f"{relation.left}{relation.sign}{relation.right}"


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
