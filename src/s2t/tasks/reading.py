r"""Read the text of an answer as a value: a number, a formula, a list, a tuple, an interval, a relation.

A list is all of its items; what has a part that is none of these stays a formula as it is written, to be read whole or
not at all. Knows where no answer comes from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from s2t.tasks.numerals import is_unit, parse_number
from s2t.tasks.values import INFINITY, MINUS_INFINITY, Either, Interval, Items, Leaf, Node, Relation, Union, is_name
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
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!=", "~": "~", "in": "in"}
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<=[)\]])\s*U\s*(?=[(\[])|(?<=[)\]])\s*union\s*(?=[(\[])")
_SET_MINUS = re.compile(r"\\setminus(?![A-Za-z])")
_REALS = re.compile(r"\\mathbb\{R\}|\(-\\infty\s*,\s*\+?\\infty\)|all real numbers|\\text\s*\{\s*all real numbers\s*\}")
_DOMAIN = re.compile(
    r"(?:\\text\s*\{[^{}]*\}|where|for|with|all|any|some|every|\s)*[A-Za-z]\s*(?:\\in\s*(?:\\mathbb\{[A-Z]\}|[ZNQR])(?:[_^]\{?[+*0]\}?)?"
    r"|(?:\\text\s*\{)?\s*(?:is|are)?\s*(?:an?|any|some|arbitrary|integers?|positive|natural|real|numbers?|constants?|\s)+\}?)"
)
_FRENCH = re.compile(r"\](?P<low>[^\[\]]+)[,;](?P<high>[^\[\]]+)\[")
_MATRIX = re.compile(r"\\begin\s*\{([pbB]?matrix|smallmatrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}")
_BASE = re.compile(r"\(?([0-9A-Z]+)\)?_\{?([0-9]+)\}?")
_TRAILING_UNIT = re.compile(
    r"(?<=[})0-9])\s+((?:square |cubic )?(?:cm|mm|km|kg|ft|[a-z]{4,}))(?:\s?\^\s?\{?-?[0-9]\}?)?$"
)
_CLOCK = re.compile(r"([0-9]{1,2}:[0-9]{2})(?:\s*(?:\\text\s*\{\s*)?[AaPp]\.?\s?[Mm]\.?\s*\}?)?")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_TRAILING_TEXT = re.compile(r"\s*\\text\s*\{([^{}0-9]*)\}(?:\^\{?-?[0-9]\}?)?$")
_WORDS = re.compile(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*")
_STRAY_LETTER = re.compile(r"[a-z](\([^()]*\]|\[[^\[\]]*\))")  # t(0,4] can only be an interval
_DEGREES_IN = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*([0-9]+)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?")
_TIGHT_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


def read(text: str) -> Node:
    """The value that a whole answer states."""
    return _read(bare(tidy(text)), 0)


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
        ranges = [range_of(item) for item in items]
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
    is_named = isinstance(first, Relation) and first.sign == "=" and is_name(first.left)
    if not isinstance(first, Relation) or not is_named or any(isinstance(item, Relation) for item in items[1:]):
        return items
    return [first, *(Relation(first.left, "=", _written(item), item) for item in items[1:])]


def _written(node: Node) -> str:
    return node.text if isinstance(node, Leaf) else ""


def _special(text: str, depth: int) -> Node | None:
    """Unions, differences, the reals, the empty set, and both signs at once."""
    if _REALS.fullmatch(text):
        return Interval(MINUS_INFINITY, INFINITY, True, True)
    if text in ("\\emptyset", "\\{\\}"):
        return Union()
    outer, _ = split(text, _RELATION)
    if len(outer) == 1:
        for pattern in (_UNION, _SET_MINUS):
            parts, found = split(text, pattern)
            if found and all(part.strip() for part in parts):
                ranges = [range_of(_read(part, depth + 1)) for part in parts]
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
    sides = [side.strip() for side in sides]
    if not sides[0] and len(signs) == 1 and signs[0] in "=~":
        return _read(sides[1], depth + 1)
    node: Node | None = None
    if all(sides) and set(signs) <= {"=", "~"}:
        node = _equation(sides, signs, depth)
    elif all(sides) and len(signs) == 1:
        node = Relation(sides[0], signs[0], sides[1], _read(sides[1], depth + 1))
    elif all(sides) and len(signs) == 2 and is_name(sides[1]):
        node = _between(sides, signs, depth)
    return node or Leaf(text)


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
    """An interval, a matrix, or what stands in one pair of brackets."""
    if match := _FRENCH.fullmatch(text):
        return Interval(_read(match["low"], depth + 1), _read(match["high"], depth + 1), True, True)
    if match := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\cr(?![A-Za-z])", match[2]) if row.strip()]
        return Items("matrix", tuple(Items("tuple", _all_read(row.split("&"), depth)) for row in rows))
    for opening, closing_mark in (("\\{", "\\}"), ("\\langle", "\\rangle")):
        if text.startswith(opening) and text.endswith(closing_mark):
            items = _inside(text[len(opening) : -len(closing_mark)], depth)
            if items is None:
                return None
            return _flat_list(items) if opening == "\\{" else Items("tuple", items)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and not _closes_early(text):
        items = _inside(text[1:-1], depth)
        return None if items is None else _in_brackets(items, text[0] + text[-1])
    return None


def _inside(text: str, depth: int) -> tuple[Node, ...] | None:
    """The items between two brackets; None where one is missing."""
    parts = [part.strip() for part in split(text, re.compile("[,;]"))[0]]
    items = _all_read(parts, depth) if all(parts) else None
    return None if items is None or Union() in items else items


def _all_read(parts: list[str], depth: int) -> tuple[Node, ...]:
    return tuple(_read(part, depth + 1) for part in parts)


def _in_brackets(items: tuple[Node, ...], brackets: str) -> Node | None:
    """A value, an interval or a tuple, as the brackets say; None where they do not fit."""
    if len(items) == 2 and brackets != "()":
        return Interval(*items, brackets[0] == "(", brackets[1] == ")")
    if brackets not in ("()", "[]"):
        return None
    return items[0] if len(items) == 1 else Items("tuple", items)


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
    match = _TRAILING_TEXT.search(text) or _TRAILING_UNIT.search(text)
    cut = text[: match.start()] if match and is_unit(match[1]) else text
    if cut.strip() and cut != text:
        return _read(cut, depth + 1)
    if match := _CLOCK.fullmatch(text):
        return Leaf(match[1])
    return Leaf(text)


def range_of(node: Node | None) -> Interval | Union | None:
    """The real numbers that a node stands for; None for one that is no such set."""
    if isinstance(node, Relation):
        return range_of(node.value) if node.sign == "in" else _solved(node)
    if isinstance(node, Items):
        if node.kind == "tuple" and len(node.items) == 2:
            return Interval(*node.items, True, True)
        return _union([_part(item) for item in node.items]) if node.kind == "list" else None
    if isinstance(node, Leaf):
        return _point(node) if node.text else None
    return node if isinstance(node, (Interval, Union)) else None


def _solved(relation: Relation) -> Interval | Union | None:
    """Where a relation of a name to a bound holds."""
    left, sign, right = relation.left, relation.sign, relation.right
    if not is_name(left):
        left, sign, right = right, FLIPPED[sign], left
    if not is_name(left) or sign not in ("<", "<=", ">", ">=", "!="):
        return None
    bound = _read(right, 6)
    below = Interval(MINUS_INFINITY, bound, True, sign in ("<", "!="))
    above = Interval(bound, INFINITY, sign in (">", "!="), True)
    return Union((below, above)) if sign == "!=" else below if sign in ("<", "<=") else above


def _part(node: Node) -> Interval | Union:
    """An item of a list of numbers and intervals."""
    is_pair = isinstance(node, Items) and node.kind == "tuple" and len(node.items) == 2
    found = range_of(node) if is_pair or isinstance(node, (Interval, Union)) else None
    return _point(node) if found is None else found


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
    if whole != Interval(MINUS_INFINITY, INFINITY, True, True) or any(key is None for key in keys):
        return Leaf(text)
    ordered = [part.low for _, part in sorted(zip(keys, points, strict=True), key=lambda pair: pair[0] or 0)]  # type: ignore[union-attr]
    bounds = [MINUS_INFINITY, *ordered, INFINITY]
    return _union([Interval(low, high, True, True) for low, high in pairwise(bounds)])


def _intersection(one: Interval | Union | None, other: Interval | Union | None) -> Interval | None:
    """Of two rays that face each other: "x > 1 and x < 2"."""
    if not isinstance(one, Interval) or not isinstance(other, Interval):
        return None
    for up, down in ((one, other), (other, one)):
        if up.high == INFINITY and down.low == MINUS_INFINITY:
            return Interval(up.low, down.high, up.is_low_open, down.is_high_open)
    return None


def _number(node: Node) -> Fraction | None:
    return parse_number(node.text) if isinstance(node, Leaf) else None
