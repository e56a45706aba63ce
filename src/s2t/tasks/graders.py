"""Decide whether the answer that a text states equals the gold answer.

Plain numbers compare exactly, lists and intervals part by part, and formulas by their value in a process of its own.
Knows no tasks, no models and no files.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from s2t.records import Grade
from s2t.tasks import judge
from s2t.tasks.extraction import boxed_together, extract_answer, marked_segments
from s2t.tasks.numerals import numeral_value, parse_number, read_number
from s2t.tasks.reading import read, split
from s2t.tasks.sameness import is_same
from s2t.tasks.values import leaves
from s2t.tasks.writing import bare, tidy

__all__ = [
    "canonical_answer",
    "extract_answer",
    "grade_math",
    "is_readable",
    "is_same_answer",
    "marked_segments",
    "parse_number",
]

_TEXT_COMMAND = re.compile(r"\\text\s*\{([^{}]*)\}")
_LETTER = re.compile(r"[A-Za-z]")
_IN_BASE = re.compile(r"\(?([0-9A-Z]+)\)?_\{?([0-9]+)\}?")
_UNIT_IN_LETTERS = re.compile(r"\s(?:[a-z]{3,}|cm|mm|km|kg|ft|hr|mi|lb|oz|ml|mL|mg|ms)(?![A-Za-z])")
_WORDS = re.compile(r"[A-Za-z]{4,}(?:[ '-][A-Za-z]+)*")
_SIGN = re.compile(r"<=|>=|!=|[=<>]")
# Towers of four would only keep the judge busy until its time is over.
_TOWER = r"\^[\s{(]*-?[0-9.]+[\s{(]*"
_EXPLOSIVE = re.compile(_TOWER * 3)
_EXACT_MARKS = ("/", "frac", "overline")
_MAX_FORMULA = 400
_MAX_ANSWER = 3000
_MAX_ASKED, _MAX_BROKEN = 400, 2


def grade_math(gold: str, text: str, tolerance: float | None = None) -> Grade:
    """Grade a text against a gold answer; anything that cannot be parsed is not correct.

    `tolerance` is the absolute error allowed between plain numbers. Raises MissingExtraError when the
    answer is no plain number and math-verify is not installed.
    """
    extracted = extract_answer(text, parse_number(gold) is not None)
    if extracted is None:
        return Grade(False, None)
    if is_same_answer(gold, extracted, tolerance):
        return Grade(True, extracted)
    together = boxed_together(text) if "," in gold else None
    return Grade(together is not None and is_same_answer(gold, together), extracted)


def is_same_answer(gold: str, answer: str, tolerance: float | None = None) -> bool:
    """Whether two answers have the same value: by rational arithmetic for plain numbers, else part by part."""
    left, right = parse_number(gold), parse_number(answer)
    if left is not None and right is None:
        right = numeral_value(answer)
    if left is not None and right is not None:
        return _is_number_equal(gold, answer, left, right, Fraction(tolerance or 0))
    if (same := canonical_answer(gold)) is not None and same == canonical_answer(answer):
        return True
    if max(len(gold), len(answer)) > _MAX_ANSWER or _WORDS.fullmatch(bare(gold)):
        return False
    return is_same(read(gold), read(answer), _Formulas().is_same)


def is_readable(answer: str) -> bool:
    """Whether an answer is a plain number or something whose every part can be read."""
    if parse_number(answer) is not None:
        return True
    asked = _Formulas()
    found = leaves(read(answer))
    return bool(found) and all(asked.is_readable(leaf) for leaf in found)


def canonical_answer(text: str | None) -> str | None:
    """The form in which answers vote: "12", "12.0" and "$12" are one; None stays None, as does empty text."""
    if text is None or not text.strip():
        return None
    number = parse_number(text)
    if number is not None:
        return str(number)
    plain = bare(_TEXT_COMMAND.sub(r"\1", tidy(text))) if len(text) <= _MAX_ANSWER else text
    plain = re.sub(r"_\{(\w+)\}", r"_\1", re.sub(r"\^\{(\w)\}", r"^\1", plain))
    plain = re.sub(r"(?<![0-9]) +| +(?![0-9])", "", " ".join(plain.split())).rstrip(".")
    plain = re.sub(r"^\(([A-Za-z])\)$", r"\1", plain)
    return plain.casefold() if plain.isalpha() and len(plain) > 1 else plain or None


def _is_number_equal(gold: str, answer: str, left: Fraction, right: Fraction, tolerance: Fraction) -> bool:
    """Exactly or within the tolerance; where one side alone has a percent sign, that side is its hundredth, too."""
    if abs(left - right) <= tolerance:
        return True
    percents = [_has_percent(side) for side in (gold, answer)]
    readings = [(left, right)]
    if percents[0] != percents[1]:
        readings.append((left / 100, right) if percents[0] else (left, right / 100))
    is_rounded = _is_rounded(gold, answer)
    return any(one == other or (is_rounded and _agrees_rounded(one, other)) for one, other in readings)


def _has_percent(text: str) -> bool:
    return re.search(r"%|\bper\s?cent\b|\bpct\b", text) is not None


def _is_rounded(gold: str, answer: str) -> bool:
    """Whether one side is a decimal and the other something that may have no end as one: two exact sides are never rounded."""
    is_exact = [any(mark in side for mark in _EXACT_MARKS) for side in (tidy(gold), tidy(answer))]
    return is_exact[0] != is_exact[1] and "." in (answer if is_exact[0] else gold)


def _agrees_rounded(left: Fraction, right: Fraction) -> bool:
    """Equal in six decimals, and to one part in ten thousand: of a small number six decimals say too little."""
    is_near = abs(left - right) * 10_000 <= max(abs(left), abs(right))
    return is_near and round(left, 6) == round(right, 6)


class _Formulas:
    """Compares formulas for one answer; of one that breaks or delays the judge, few are looked at."""

    def __init__(self) -> None:
        self._asked, self._broken = 0, 0

    def is_same(self, gold: str, answer: str) -> bool:
        """Whether two tidied formulas, relations or words are the same."""
        found = _same_number(gold, answer)
        if found is None:
            found = _same_spelling(gold, answer)
        return self._has_same_value(gold, answer) if found is None else found

    def _has_same_value(self, gold: str, answer: str) -> bool:
        self._asked += 1
        if self._asked > _MAX_ASKED or self._broken > _MAX_BROKEN or not all(map(_is_bounded, (gold, answer))):
            return False
        has_sign = [len(split(side, _SIGN)[0]) > 1 for side in (gold, answer)]
        if has_sign[0] != has_sign[1]:
            return False
        if has_sign[0]:
            found = _proportional(gold, answer)
        else:
            found = _judged(_as_formula(gold), _as_formula(answer), _is_decimal(gold) != _is_decimal(answer))
        self._broken += found is None
        return bool(found)

    def is_readable(self, formula: str) -> bool:
        """Whether all of a tidied formula can be read."""
        if parse_number(formula) is not None or read_number(formula) is not None:
            return True
        return bool(judge.ask("math_verify", kind="parses", text=formula))


def _same_number(gold: str, answer: str) -> bool | None:
    """Whether two plain numbers are equal; None where one is none."""
    left, right = parse_number(gold), parse_number(answer)
    if left is not None and right is None:
        right = numeral_value(answer)
    elif left is None and _UNIT_IN_LETTERS.search(gold):
        left, right = numeral_value(gold), numeral_value(answer)
    return None if left is None or right is None else _is_number_equal(gold, answer, left, right, Fraction(0))


def _same_spelling(gold: str, answer: str) -> bool | None:
    """Whether two texts are equal where their spelling says so; None where their values decide."""
    if (spelled := canonical_answer(gold)) is not None and spelled == canonical_answer(answer):
        return True
    if any(form.fullmatch(gold) and form.fullmatch(answer) for form in (_LETTER, _WORDS)):
        return False
    return _same_in_base(gold, answer) if any(_IN_BASE.fullmatch(side) for side in (gold, answer)) else None


def _is_bounded(formula: str) -> bool:
    return formula.strip() != "" and len(formula) <= _MAX_FORMULA and _EXPLOSIVE.search(formula) is None


def _as_formula(text: str) -> str:
    """A plain number with nothing but digits; other formulas as they are."""
    value = parse_number(text)
    if value is None and re.search(r"[a-z]{4,}", text):
        value = numeral_value(text)
    return text if value is None or _has_percent(text) else f"({value})"


def _is_decimal(text: str) -> bool:
    return "." in text and parse_number(text) is not None


def _same_in_base(gold: str, answer: str) -> bool:
    """Digits in a stated base are equal to the same digits in it, and those in base ten to the number."""
    sides = []
    for side in (gold, answer):
        match = _IN_BASE.fullmatch(side)
        number = parse_number(match[1] if match and match[2] == "10" else side)
        sides.append(number if number is not None or match is None else (match[1], match[2]))
    return sides[0] is not None and sides[0] == sides[1]


@lru_cache(maxsize=4096)  # votes ask for the same answers again and again
def _judged(gold: str, answer: str, is_rounded: bool) -> bool | None:
    return judge.ask("math_verify", kind="equal", gold=gold, answer=answer, is_rounded=is_rounded)


@lru_cache(maxsize=4096)
def _proportional(gold: str, answer: str) -> bool | None:
    """Whether two relations of one sign are the same up to a factor: positive, except for equations."""
    sides = [split(side, _SIGN) for side in (gold, answer)]
    if any(len(signs) != 1 or not all(part.strip() for part in parts) for parts, signs in sides):
        return False
    (first, one), (second, other) = sides
    sign = judge.ask("math_verify", kind="proportion", first=first, second=second)
    return None if sign is None else one == other and sign != 0 and (sign > 0 or one[0] in ("=", "!="))
