"""Read an answer out of a text and decide whether it equals the gold answer.

Plain numbers compare exactly, the rest goes through math-verify. Knows no tasks, no models and no files.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from s2t.records import Grade
from s2t.tasks import judge

_NUMERAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(rf"(?<![\w)])-?[$£€]?(?:{_NUMERAL})|(?:{_NUMERAL})")
_PLAIN_NUMBER = re.compile(rf"([-+]?)({_NUMERAL})(?:\s*/\s*({_NUMERAL}))?\s*(?:\\?%)?")
_NUMBER_WITH_UNIT = re.compile(rf"([-+]?(?:{_NUMERAL}))\s*[A-Za-z°][A-Za-z°/ .'-]*")
_PHRASE = re.compile(r"\banswer\s*(?:is|:)\s*:?", re.IGNORECASE)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_SIMPLE_FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?[0-9]+)\}\s*\{([0-9]+)\}")
_SPACES = re.compile(r"\\[!,;: ]|~")
# Towers and huge exponents would keep exact arithmetic busy for ever, out of reach of any timeout.
_POWER = r"(?:\^|\*\*)[\s{(]*-?"
_EXPLOSIVE = re.compile(rf"{_POWER}[0-9.]+[\s}})]*(?:\^|\*\*)|{_POWER}[0-9]{{6,}}|[0-9]{{5,}}\s*!")
_MAX_NUMERAL = 200
_MAX_EXPRESSION = 400


def extract_answer(text: str, gold_is_number: bool) -> str | None:
    r"""The final answer stated in a text; None when there is none.

    Looked for in this order: after the last `####`, in the last `\boxed{}`, in the last `<answer>` tag, after
    "answer is"; else the last number (number golds) or the last line that is not empty. A box that follows
    the last `####` wins over it, since `####` then opened a heading.
    """
    segments = [segment.strip() for segment in marked_segments(text) if segment.strip()]
    phrases = list(_PHRASE.finditer(text))
    phrase = text[phrases[-1].end() :].strip() if phrases else ""
    if gold_is_number:
        return _extract_number(text, segments, phrase)
    if segments:
        return segments[0]
    lines = [line.strip() for line in (phrase or text).splitlines() if line.strip()]
    if not lines:
        return None
    return lines[0].rstrip(". ") if phrase else lines[-1]


def grade_math(gold: str, text: str, tolerance: float | None = None) -> Grade:
    """Grade a text against a gold answer; anything that cannot be parsed is not correct.

    `tolerance` is the absolute error allowed between plain numbers. Raises MissingExtraError when the
    answer is no plain number and math-verify is not installed.
    """
    extracted = extract_answer(text, parse_number(gold) is not None)
    if extracted is None:
        return Grade(False, None)
    return Grade(is_same_answer(gold, extracted, tolerance), extracted)


def is_same_answer(gold: str, answer: str, tolerance: float | None = None) -> bool:
    """Whether two answers have the same value: exactly for plain numbers, else as math-verify has it."""
    left, right = parse_number(gold), parse_number(answer)
    if left is not None and right is not None:
        if abs(left - right) <= Fraction(tolerance or 0):
            return True
        if not any(mark in gold + answer for mark in ("/", "%", "frac")):
            return False  # two decimals that differ; fractions and percentages may still agree when rounded
    if canonical_answer(gold) == canonical_answer(answer):
        return True
    return not _is_words(gold) and _is_math_equal(gold, answer)


def canonical_answer(text: str | None) -> str | None:
    """The form in which answers vote: "12", "12.0" and "$12" are one; None stays None, as does empty text."""
    if text is None or not text.strip():
        return None
    number = parse_number(text)
    if number is not None:
        return str(number)
    plain = _TEXT_COMMAND.sub(r"\1", _without_markup(text)).replace("\\left", "").replace("\\right", "")
    plain = re.sub(r"\\[dt]frac", r"\\frac", plain)
    plain = "".join(plain.split()).rstrip(".")
    return plain.casefold() if plain.isalpha() else plain or None


def parse_number(text: str) -> Fraction | None:
    """The exact value of a plain number ("$1,200", "-3.50", "1/2", "50%" as 50); None for all else."""
    plain = _TEXT_COMMAND.sub("", _SIMPLE_FRACTION.sub(r"\1/\2", _without_markup(text))).strip().rstrip(".")
    match = _PLAIN_NUMBER.fullmatch(plain) if len(plain) <= _MAX_NUMERAL else None
    if match is None:
        return None
    sign, over, under = match.groups()
    denominator = Fraction(under.replace(",", "")) if under else Fraction(1)
    if denominator == 0:
        return None
    value = Fraction(over.replace(",", "")) / denominator
    return -value if sign == "-" else value


def _extract_number(text: str, segments: list[str], phrase: str) -> str | None:
    for segment in [*segments, phrase]:
        number = _read_number(segment)
        if number is not None:
            return number
    if segments:
        return segments[0]
    lines = phrase.splitlines()
    found = _NUMBER.findall(lines[0].rpartition("=")[2]) if lines else []
    if found:
        return _numeral(found[0])
    found = _NUMBER.findall(text.replace("−", "-"))
    return _numeral(found[-1]) if found else None


def marked_segments(text: str) -> list[str]:
    """What the `####`, boxed and tag markers enclose, the most trusted first."""
    boxed, tags = _last_boxed(text), re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    _, mark, tail = text.rpartition("####")
    hashed = [tail] if mark else []
    box = [boxed] if boxed is not None else []
    ordered = [*box, *hashed] if _last_boxed(tail) is not None else [*hashed, *box]
    return [*ordered, *tags[-1:]]


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` with its braces balanced; None when there is none."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin, depth = text.index("{", start) + 1, 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return None


def _read_number(segment: str) -> str | None:
    """The number that the first line of a segment states, alone, with a unit, or after an equals sign."""
    line = segment.splitlines()[0].strip() if segment else ""
    plain = _TEXT_COMMAND.sub("", _without_markup(line)).strip()
    for part in (plain, plain.rpartition("=")[2].strip()):
        if parse_number(part) is not None:
            return _numeral(part)
        match = _NUMBER_WITH_UNIT.fullmatch(part)
        if match:
            return _numeral(match[1])
    return None


def _numeral(text: str) -> str:
    return re.sub(r"[,$£€+]", "", _without_markup(text)).rstrip(".").strip()


def _without_markup(text: str) -> str:
    """The text without the dollars, brackets and spaces that TeX and prose put around an answer."""
    plain = text.replace("−", "-").replace("{,}", ",").replace("\\$", "$").strip().strip("*").strip()
    plain = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", plain, flags=re.DOTALL)
    boxed = re.fullmatch(r"\$*\\boxed\{(.*)\}\$*", plain, re.DOTALL)
    plain = boxed[1] if boxed else plain
    plain = re.sub(r"[$£€¥]", "", _SPACES.sub(" ", plain))
    return plain.strip()


def _is_words(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z]{4,}(?:[ -][A-Za-z]+)*\.?", text.strip()) is not None


@lru_cache(maxsize=4096)
def _is_math_equal(gold: str, answer: str) -> bool:
    if any(len(side) > _MAX_EXPRESSION or _EXPLOSIVE.search(side) for side in (gold, answer)):
        return False
    return bool(judge.ask("math_verify", kind="equal", gold=gold, answer=answer))
