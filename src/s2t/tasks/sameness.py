"""Whether two values are the same: part by part, with lists in any order and every item once.

Two formulas are left to the function that is given. Knows no text beyond names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from s2t.tasks.reading import FLIPPED, range_of, read
from s2t.tasks.values import Either, Interval, Items, Leaf, Node, Relation, Union, is_name

Same = Callable[[str, str], bool]


def is_same(gold: Node, answer: Node, same: Same) -> bool:
    """Whether two values are the same; `same` decides for two formulas or words."""
    return _Comparison(same).is_same(gold, answer)


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
        return self._of_kind(gold, answer)

    def _of_kind(self, gold: Node, answer: Node) -> bool:
        if isinstance(gold, Relation) or isinstance(answer, Relation):
            return self._related(gold, answer)
        if isinstance(gold, (Interval, Union)) or isinstance(answer, (Interval, Union)):
            return self._ranges(_set_of(gold), _set_of(answer))
        if isinstance(gold, Items) and isinstance(answer, Items):
            return self._items(gold, answer)
        return isinstance(gold, Leaf) and isinstance(answer, Leaf) and self._same(gold.text, answer.text)

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
            return self._ranges(range_of(related), _set_of(other))
        return False

    def _relations(self, gold: Relation, answer: Relation) -> bool:
        if gold.sign == answer.sign == "=" and is_name(gold.left) and is_name(answer.left):
            value = _under_name(answer, gold.left)
            if value is not None:
                return self.is_same(gold.value, value)
        ways = (answer, Relation(answer.right, FLIPPED[answer.sign], answer.left, Leaf(answer.left)))
        for way in ways:
            if (
                way.sign == gold.sign
                and self.is_same(Leaf(gold.left), Leaf(way.left))
                and self.is_same(Leaf(gold.right), Leaf(way.right))
            ):
                return True
        return any(way.sign == gold.sign and self._same(_sides(gold), _sides(way)) for way in ways)


def _member(relation: Relation) -> Node:
    return relation.value if relation.sign == "in" else range_of(relation) or relation


def _set_of(node: Node) -> Interval | Union | None:
    return range_of(node) if isinstance(node, (Interval, Union, Items)) else None


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
        return read(re.sub(rf"(?<![A-Za-z\\]){old}(?![A-Za-z])", new, relation.right))
    is_y = [side == "y" for side in (ours, theirs)]
    return relation.value if any(is_y) and any(functions) else None


def _sides(relation: Relation) -> str:
    """Both sides in one text, for a comparison up to a factor."""
    return f"{relation.left}{relation.sign}{relation.right}"
