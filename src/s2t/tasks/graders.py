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
_PLAIN_NUMBER = re.compile(rf"([-+]?)\s*({_NUMERAL})(?:\s*/\s*({_NUMERAL}))?\s*(?:\\?%|percent)?")
_MIXED_NUMBER = re.compile(r"([-+]?)\s*([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_REPEATING = re.compile(r"([-+]?)([0-9]*)\.([0-9]*)\\overline\s*\{([0-9]+)\}")
_SCIENTIFIC = re.compile(
    rf"([-+]?(?:{_NUMERAL}))(?:\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{{?\s*([-+]?[0-9]{{1,3}})\s*\}}?|[eE]([-+]?[0-9]{{1,3}}))"
)
_GROUPS = re.compile(r"[-+]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")  # 1 200 000
# A letter that mathematics uses for a variable is no unit: "12x", but "12 m".
_NUMBER_WITH_UNIT = re.compile(rf"([-+]?(?:{_NUMERAL}))\s*(?![abeijknpqrtuvwxyz](?![A-Za-z]))[A-Za-z°][A-Za-z°/ .'-]*")
_PHRASE = re.compile(r"\banswer\s*(?:is|:)\s*:?(?!\s*not\b)", re.IGNORECASE)
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_WORDS = {word: value for value, word in enumerate([*_SMALL.split(), "eighteen", "nineteen"])}
_TENS_NAMES = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * (2 + place) for place, word in enumerate(_TENS_NAMES.split())}
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_SIMPLE_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])\s*([0-9]))")
_IN_BASE = re.compile(r"([0-9A-Z]+)_\{?([0-9]+)\}?")
_LETTER = re.compile(r"[A-Za-z]")
_LESS = r"(<|\\leqslant|\\leq|\\le|\\lt|≤)"
_RELATION = re.compile(r"[<>≤≥]|\\(?:leqslant|geqslant|leq|geq|le|ge|lt|gt)(?![a-z])")
_ONE_SIDED = re.compile(rf"[A-Za-z]\s*({_RELATION.pattern})\s*([^<>≤≥]+)")
_BETWEEN = re.compile(rf"([^<≤]+?)\s*{_LESS}\s*([A-Za-z])\s*{_LESS}\s*([^<≤]+)")
_JOINED = re.compile(r"[\s,;]*\\text\s*\{[\s,;]*(?:and|or)?\s*\}[\s,;]*")
_MODULO = re.compile(r"\\pmod\s*\{[^{}]*\}")
_DEGREES_IN = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*([0-9]+)\s*\^\s*\{?\s*\\circ\s*\}?\s*[)}]?")
_SUBSCRIPTED = re.compile(r"^(\$?[A-Za-z])_(?:\{[^{}]*\}|\w)\s*=")
_STRAY_LETTER = re.compile(r"^\$?[a-z](\([^()]*\]|\[[^\[\]]*\))\$?$")  # t(0,4] can only be an interval
_SPACES = re.compile(r"\\[!,;: ]|~")
# Towers and huge exponents would keep exact arithmetic busy for ever, out of reach of any timeout.
_POWER = r"(?:\^|\*\*)[\s{(]*-?"
_EXPLOSIVE = re.compile(rf"{_POWER}[0-9.]+[\s}})]*(?:\^|\*\*)|{_POWER}[0-9]{{6,}}|[0-9]{{5,}}\s*!")
_STRICT = ("<", ">", "\\lt", "\\gt")
_EXACT_MARKS = ("/", "frac", "overline")
_MAX_NUMERAL = 200
_MAX_BOXED_LINE = 2000
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
    if is_same_answer(gold, extracted, tolerance):
        return Grade(True, extracted)
    together = _boxed_together(text) if "," in gold else None
    return Grade(together is not None and is_same_answer(gold, together), extracted)


def is_same_answer(gold: str, answer: str, tolerance: float | None = None) -> bool:
    """Whether two answers have the same value: by rational arithmetic for plain numbers, else as math-verify has it."""
    left, right = parse_number(gold), parse_number(answer)
    if left is not None and right is not None:
        return _is_number_equal(gold, answer, left, right, Fraction(tolerance or 0))
    if canonical_answer(gold) == canonical_answer(answer):
        return True
    for form in (_IN_BASE, _LETTER):
        if all(form.fullmatch(_without_markup(side)) for side in (gold, answer)):
            return False  # math-verify is blind to the base of digits and to the case of a letter
    return not _is_words(gold) and _is_math_equal(gold, answer)


def _is_number_equal(gold: str, answer: str, left: Fraction, right: Fraction, tolerance: Fraction) -> bool:
    """Exactly or within the tolerance; where one side alone has a percent sign, that side is its hundredth, too."""
    if abs(left - right) <= tolerance:
        return True
    readings = [(left, right)]
    if ("%" in gold) != ("%" in answer):
        readings.append((left / 100, right) if "%" in gold else (left, right / 100))
    is_rounded = _is_rounded(gold, answer)
    return any(one == other or (is_rounded and _agrees_rounded(one, other)) for one, other in readings)


def _is_rounded(gold: str, answer: str) -> bool:
    """Whether one side is a decimal and the other something that may have no end as one: two exact sides are never rounded."""
    is_exact = [any(mark in side for mark in _EXACT_MARKS) for side in (gold, answer)]
    return is_exact[0] != is_exact[1] and "." in (answer if is_exact[0] else gold)


def _agrees_rounded(left: Fraction, right: Fraction) -> bool:
    """Equal in six decimals, and to one part in ten thousand: of a small number six decimals say too little."""
    is_near = abs(left - right) * 10_000 <= max(abs(left), abs(right))
    return is_near and round(left, 6) == round(right, 6)


def is_readable(answer: str) -> bool:
    """Whether an answer is a plain number or something that math-verify can parse."""
    return parse_number(answer) is not None or bool(
        judge.ask("math_verify", kind="parses", text=_as_math(answer, answer))
    )


def canonical_answer(text: str | None) -> str | None:
    """The form in which answers vote: "12", "12.0" and "$12" are one; None stays None, as does empty text."""
    if text is None or not text.strip():
        return None
    number = parse_number(text)
    if number is not None:
        return str(number)
    plain = _TEXT_COMMAND.sub(r"\1", _without_markup(text)).replace("\\left", "").replace("\\right", "")
    plain = re.sub(r"\\[dt]frac", r"\\frac", plain)
    plain = re.sub(r"_\{(\w+)\}", r"_\1", plain)
    plain = re.sub(r"(?<![0-9]) +| +(?![0-9])", "", " ".join(plain.split())).rstrip(".")
    return plain.casefold() if plain.isalpha() and len(plain) > 1 else plain or None


def parse_number(text: str) -> Fraction | None:
    """The exact value of a plain number ("$1,200", "-3.50", "3 1/2", "1.2e3", "50%" as 50); None for all else."""
    if len(text) > 2 * _MAX_NUMERAL:
        return None
    plain = _SIMPLE_FRACTION.sub(_slashed, _without_markup(text))
    plain = (plain[:1] + _TEXT_COMMAND.sub("", plain[1:])).strip().rstrip(".")  # a unit stands behind
    if len(plain) > _MAX_NUMERAL:
        return None
    if _GROUPS.fullmatch(plain):
        plain = plain.replace(" ", "")
    match = _PLAIN_NUMBER.fullmatch(plain)
    if match is None:
        return _parse_rare(plain)
    sign, over, under = match.groups()
    value = _ratio(over.replace(",", ""), under.replace(",", "") if under else "1")
    return -value if sign == "-" and value is not None else value


def _parse_rare(plain: str) -> Fraction | None:
    """Mixed numbers, powers of ten and repeating decimals."""
    if match := _MIXED_NUMBER.fullmatch(plain):
        sign, whole, over, under = match.groups()
        part = _ratio(over, under)
        value = None if part is None or part >= 1 else int(whole) + part
        return -value if sign == "-" and value is not None else value
    if match := _SCIENTIFIC.fullmatch(plain):
        return Fraction(match[1].replace(",", "")) * Fraction(10) ** int(match[2] or match[3])
    if match := _REPEATING.fullmatch(plain):
        sign, whole, once, again = match.groups()
        value = Fraction(int(again), 10 ** len(once) * (10 ** len(again) - 1)) + Fraction(f"{whole or 0}.{once or 0}")
        return -value if sign == "-" else value
    return None


def _ratio(over: str, under: str) -> Fraction | None:
    denominator = Fraction(under)
    return Fraction(over) / denominator if denominator else None


def _slashed(match: re.Match[str]) -> str:
    over, under = (match[1], match[2]) if match[1] else (match[3], match[4])
    return f" {over}/{under}"  # the space tells a mixed number from a longer numerator


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
    if (value := _value_of_words(" ".join(re.findall(r"[A-Za-z-]+", phrase)[:1]))) is not None:
        return str(value)
    found = _NUMBER.findall(text.replace("−", "-"))
    return _numeral(found[-1]) if found else None


def marked_segments(text: str) -> list[str]:
    """What the `####`, boxed and tag markers enclose, the most trusted first."""
    boxed, tags = _last_boxed(text), _last_tagged(text)
    _, mark, tail = text.rpartition("####")
    hashed = [tail] if mark else []
    box = [boxed] if boxed is not None else []
    ordered = [*box, *hashed] if _last_boxed(tail) is not None else [*hashed, *box]
    return [*ordered, *tags]


def _last_tagged(text: str) -> list[str]:
    """The content of the last closed `<answer>` tag, or nothing."""
    head, mark, _ = text.rpartition("</answer>")
    _, begin, content = head.rpartition("<answer>")
    return [content] if mark and begin else []


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


def _boxed_together(text: str) -> str | None:
    r"""The boxes of the last line that has some, as one list: "\boxed{8} and \boxed{2}" is "8, 2"."""
    lines = [line for line in text.splitlines() if "\\boxed{" in line and len(line) <= _MAX_BOXED_LINE]
    rest, found = lines[-1] if lines else "", []
    while (box := _last_boxed(rest)) is not None:
        found.append(box)
        rest = rest[: rest.rfind("\\boxed{")]
    return ", ".join(reversed(found)) if len(found) > 1 else None


def _read_number(segment: str) -> str | None:
    """The number that the first line of a segment states: alone, with a unit, in words, or beside an equals sign."""
    line = segment.splitlines()[0].strip() if segment else ""
    bare = _MODULO.sub("", _without_markup(line))
    for plain in (_TEXT_COMMAND.sub("", bare).strip(), _TEXT_COMMAND.sub(r"\1", bare).strip()):
        left, equals, right = plain.rpartition("=")
        is_named = equals and re.fullmatch(r"[A-Za-z]", right.strip())  # 18 = x
        for part in (plain, (left if is_named else right).strip()):
            if parse_number(part) is not None:
                return _numeral(part)
            match = _NUMBER_WITH_UNIT.fullmatch(part)
            if match:
                return _numeral(match[1])
    value = _value_of_words(_TEXT_COMMAND.sub(r"\1", bare))
    return None if value is None else str(value)


def _value_of_words(text: str) -> int | None:
    """Zero to ninety-nine, spelled out."""
    tens, _, ones = text.strip(". ").casefold().replace("-", " ").partition(" ")
    if not ones:
        return _WORDS.get(tens, _TENS.get(tens))
    return _TENS[tens] + _WORDS[ones] if tens in _TENS and 0 < _WORDS.get(ones, 0) < 10 else None


def _numeral(text: str) -> str:
    return re.sub(r"[,$£€+]", "", _without_markup(text)).rstrip(".").strip()


def _without_markup(text: str) -> str:
    """The text without the dollars, brackets and spaces that TeX and prose put around an answer."""
    plain = text.replace("−", "-").replace("{,}", ",").replace("\\!", "").replace("\\$", "$").strip().strip("*").strip()
    plain = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", plain, flags=re.DOTALL)
    boxed = re.fullmatch(r"\$*\\boxed\{(.*)\}\$*", plain, re.DOTALL)
    plain = boxed[1] if boxed else plain
    plain = re.sub(r"[$£€¥]", "", _SPACES.sub(" ", plain))
    return plain.strip()


def _is_words(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z]{4,}(?:[ -][A-Za-z]+)*\.?", text.strip()) is not None


def _is_math_equal(gold: str, answer: str) -> bool:
    if any(len(side) > _MAX_EXPRESSION or _EXPLOSIVE.search(side) for side in (gold, answer)):
        return False
    left, right = _as_math(gold, answer), _as_math(answer, gold)
    related = [_RELATION.search(side) is not None for side in (left, right)]
    if related[0] != related[1] and not any(mark in left + right for mark in "[(="):
        return False  # "> 42" is no number
    return _judged(left, right)


@lru_cache(maxsize=4096)  # votes ask for the same answers again and again
def _judged(gold: str, answer: str) -> bool:
    return bool(judge.ask("math_verify", kind="equal", gold=gold, answer=answer))


def _as_math(text: str, other: str) -> str:
    """The text in a spelling that math-verify knows: "2 < x \\le 5" is "(2, 5]", so is "x > 2" beside intervals."""
    text = _JOINED.sub(", ", _MODULO.sub("", text.replace("\\varnothing", "\\emptyset")))
    text = _STRAY_LETTER.sub(r"\1", text)
    text = _SUBSCRIPTED.sub(r"\1 =", _DEGREES_IN.sub(r"\1(\2\\pi/180)", text))
    plain = _without_markup(text)
    if match := _BETWEEN.fullmatch(plain):
        low, left, _, right, high = match.groups()
        return f"{'(' if left in _STRICT else '['}{low}, {high}{')' if right in _STRICT else ']'}"
    match = _ONE_SIDED.fullmatch(plain)
    if match is None or "\\infty" not in other:
        return text
    sign, bound = match.groups()
    is_strict = sign in _STRICT
    if sign in ("<", "≤") or sign.startswith("\\l"):
        return f"(-\\infty, {bound}{')' if is_strict else ']'}"
    return f"{'(' if is_strict else '['}{bound}, \\infty)"
