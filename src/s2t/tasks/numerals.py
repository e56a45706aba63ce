r"""The value of a plain number, however it is written: with separators, signs, units, scales, in words, as a fraction.

A number counts only when nothing but a unit is left beside it: "7\sqrt{3}" is no 7. Exact arithmetic, no library.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from s2t.tasks.number_words import DIGIT_WORDS, scale_of, words_value
from s2t.tasks.writing import bare, tidy

_NUMERAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_FRAC = r"\\frac\s*(?:\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9])\s*([0-9])|([0-9])\s*\{([0-9]+)\}|\{([0-9]+)\}\s*([0-9]))"
_SIMPLE_FRACTION = re.compile(_FRAC)
_POWER_OF_TEN = r"10\s*\^\s*(?:\{\s*([-+]?[0-9]{1,3})\s*\}|([-+]?[0-9]{1,3}))"
_REPEATED = r"\\(?:overline|bar|dot)\s*(?:\{([0-9]+)\}|([0-9]))|\(([0-9]+)\)"
_LEAD = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:"
    rf"(?P<whole>[0-9]+)\s+(?P<over>[0-9]+)\s*/\s*(?P<under>[0-9]+)"
    rf"|(?P<groups>[0-9]{{1,3}}(?: [0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?|[0-9]{{1,3}}(?:'[0-9]{{3}})+(?![0-9]))"
    rf"|(?P<before>[0-9]*)\.(?P<once>[0-9]*)(?:{_REPEATED})"
    rf"|(?P<mantissa>{_NUMERAL})(?:\s*(?:\\times|\\cdot|\*|[xX](?=\s*10\^))\s*{_POWER_OF_TEN}|[eE]([-+]?[0-9]{{1,3}})(?![0-9]))"
    rf"|(?P<left>{_NUMERAL})(?:\s*/\s*(?P<right>{_NUMERAL}))?)"
)
_MAX_NUMERAL = 200
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_PERCENT = re.compile(r"\\%|%|\b(?:percent|per\s?cent|pct)\b\.?(?!\s*age)", re.IGNORECASE)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)(?![a-z])|\^\s*\{?\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?")
_CODES = "USD EUR GBP INR CAD AUD CHF JPY CNY RMB NZD HKD SGD US Rs"
_CURRENCY_BEFORE = re.compile(rf"([-+]?)\s*(?:{'|'.join(_CODES.split())})\b\.?\s*(?=[-+.0-9])")
_ABOUT = re.compile(
    r"(?:\\approx|\\Rightarrow|~|≈|=|:|exactly|approximately|approx\.?|about|around|roughly|nearly|only|just"
    r"|(?:a|the)?\s*total(?: of)?)\s*",
    re.IGNORECASE,
)
_MINUS = re.compile(r"(?:\\text\s*\{\s*)?(?:minus|negative)(?:\s*\}\s*|\s+)", re.IGNORECASE)
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*")
# A letter that mathematics uses for a variable is no unit: "12x", but "12 m".
# Repeats are possessive: a word that is none would else be split in every way, and the time double by letter.
_WORD = r"(?![abeijknpqrtuvwxyz](?![A-Za-z]))(?:[A-Za-z]{1,24}+|\\mu\s?[A-Za-z]{0,4}+|\\Omega)"
_RAISED = r"(?:\s?\^\s?(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
_ONE_UNIT = rf"{_WORD}{_RAISED}"
_UNIT = re.compile(rf"(?:/\s?)?{_ONE_UNIT}(?:[ '.\"-]*+(?:/|\\cdot|\*|-)?\s*{_ONE_UNIT})*['\".]*")
_FRACTION_UNIT = re.compile(r"\\frac\s*\{([A-Za-z ^0-9]+)\}\s*\{([A-Za-z ^0-9]+)\}")
_NO_UNITS = {
    "or", "and", "to", "plus", "minus", "times", "over", "divided", "by", "squared", "cubed", "factorial", "if", "where", "when",
    "but", "not", "than", "half", "point", "with", "without", "unless", "versus", "vs", "except", "mod", "modulo",
}  # fmt: skip
_SHORT_SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "bn": 10**9, "mn": 10**6}
_SHORT = re.compile(r"[$€£]\s*([0-9][0-9,]*(?:\.[0-9]+)?)\s?(k|K|M|B|bn|mn)\b(?![^$\n]*\$)")


def parse_number(text: str) -> Fraction | None:
    """The exact value of a plain number ("$1,200", "-3.50", "3 1/2", "1.2e3", "50%" as 50); None for all else."""
    found = _number(text, bare_units=False)
    return None if found is None else found[0]


def read_number(text: str) -> str | None:
    """The number that a short text states, as a numeral: also with a unit in letters ("12 m^2"), a scale, or in words."""
    found = _number(text, bare_units=True)
    return None if found is None else found[1]


def numeral_value(text: str) -> Fraction | None:
    """The value of a short text that `read_number` can read."""
    found = _number(text, bare_units=True)
    return None if found is None else found[0]


def with_long_scales(text: str) -> str:
    """The text with "$5k" and "$1.5M" written out."""
    return _SHORT.sub(
        lambda short: f" {Fraction(short[1].replace(',', '')) * _SHORT_SCALES[short[2]]}", text.replace("\\$", "$")
    )


def scales_in(words: str) -> str:
    """The words of scale at the beginning of a text: "million" of "million people"."""
    found = []
    for word in words.split()[:3]:
        if scale_of(word) is None:
            break
        found.append(word)
    return " ".join(found)


def is_unit(words: str) -> bool:
    """Whether words may be a unit, and neither scale nor change the number before them."""
    return not any(word in _NO_UNITS or scale_of(word) is not None for word in re.findall("[a-z]+", words.lower()))


@lru_cache(maxsize=8192)  # a list compares the same items again and again
def _number(text: str, bare_units: bool) -> tuple[Fraction, str] | None:
    """The value and a numeral that says as much; decimals stay decimals, and a percent sign stays."""
    if not text or len(text) > 2 * _MAX_NUMERAL:
        return None
    plain = bare(tidy(with_long_scales(text) if bare_units else text))
    if bare_units:
        plain = _without_remark(_ABOUT.sub("", plain, count=1) if _ABOUT.match(plain) else plain)
        plain = _whole_text(plain)
    if not plain or len(plain) > _MAX_NUMERAL:
        return None
    return _numeric(plain, bare_units) or (_in_words(plain) if bare_units else None)


def _numeric(plain: str, bare_units: bool) -> tuple[Fraction, str] | None:
    is_negative = False
    if bare_units and (match := _MINUS.match(plain)):
        plain, is_negative = plain[match.end() :], True
    plain = _CURRENCY_BEFORE.sub(r"\1", plain, count=1)
    match = _LEAD.match(_SIMPLE_FRACTION.sub(_slashed, plain).strip())
    if match is None:
        return None
    value, rest = _value(match), match.string[match.end() :]
    factor = None if value is None else _factor(rest, bare_units)
    if value is None or factor is None:
        return None
    value = -value if is_negative else value
    numeral = re.sub(r"[,' ](?=[0-9]{3})", "", match[0])
    numeral = re.sub(r"^([-+]?)\s*", lambda sign: sign[1].strip("+"), numeral)
    if _PERCENT.search(rest):
        return value, f"{'-' * is_negative}{numeral.strip()}%"
    if factor != 1 or "\\" in numeral or "(" in numeral:
        return _scaled(value, factor)
    return value, "-" * is_negative + numeral.strip()


def _scaled(value: Fraction, factor: Fraction) -> tuple[Fraction, str]:
    return value * factor, str(value * factor)


def _value(match: re.Match[str]) -> Fraction | None:
    value = _unsigned(match)
    return -value if match["sign"] == "-" and value is not None else value


def _unsigned(match: re.Match[str]) -> Fraction | None:
    if match["whole"]:
        part = _ratio(match["over"], match["under"])
        return None if part is None or part >= 1 else int(match["whole"]) + part
    if match["groups"]:
        return Fraction(match["groups"].replace(" ", "").replace("'", ""))
    if match["once"] is not None:
        again = next(group for group in match.group(8, 9, 10) if group)
        shift = 10 ** len(match["once"])
        block = Fraction(int(again), shift * (10 ** len(again) - 1))
        return block + Fraction(f"{match['before'] or 0}.{match['once'] or 0}")
    if match["mantissa"]:
        power = int(next(group for group in match.group(12, 13, 14) if group))
        return Fraction(match["mantissa"].replace(",", "")) * Fraction(10) ** power
    return _ratio(match["left"].replace(",", ""), (match["right"] or "1").replace(",", ""))


def _ratio(over: str, under: str) -> Fraction | None:
    denominator = Fraction(under)
    return Fraction(over) / denominator if denominator else None


def _slashed(match: re.Match[str]) -> str:
    over, under = (group for group in match.groups() if group is not None)
    return f" {over}/{under} "  # the space tells a mixed number from a longer numerator


def _factor(rest: str, bare_units: bool) -> Fraction | None:
    """What the text behind a numeral multiplies it by: 1 for a unit, a scale for its word; None for anything else."""
    if not rest.strip():
        return Fraction(1)
    if not bare_units:
        if re.search(r"[A-Za-z]", _PERCENT.sub("", _TEXT.sub("", _ORDINAL.sub("", _DEGREE.sub("", rest))))):
            return None
        rest = _DEGREE.sub(" ", rest)
    rest = _ORDINAL.sub("", rest, count=1) if _ORDINAL.match(rest) else rest
    rest = _FRACTION_UNIT.sub(r" \1 / \2 ", _TEXT.sub(r" \1 ", rest))
    words = _PERCENT.sub(" ", _DEGREE.sub(" ", rest), count=1).replace("(s)", "s").split()
    factor = Fraction(1)
    while words and not _PERCENT.search(rest) and (scale := scale_of(words[0])) is not None:
        factor, words = factor * scale, words[1:]
    if "\\%" in rest and words and scale_of(words[0]) is not None:
        return None
    rest = " ".join(words).strip()
    if rest and (_UNIT.fullmatch(rest) is None or set(re.findall("[a-z]+", rest.lower())) & _NO_UNITS):
        return None
    return factor


def _without_remark(plain: str) -> str:
    """The text without a remark in brackets behind it that says no other number: "12 (twelve)"."""
    match = re.fullmatch(r"(.*[^\s(])\s+\((?!\s*or\b)([A-Za-z][A-Za-z ,.'-]*)\)", plain)
    if match is None:
        return plain
    words, numeral = words_value(match[2]), numeral_value(match[1])
    return plain if words is not None and words != numeral else match[1]


def _whole_text(plain: str) -> str:
    match = _TEXT.fullmatch(plain)
    return bare(match[1]) if match else plain


def _in_words(plain: str) -> tuple[Fraction, str] | None:
    """A number in words, with a unit behind it."""
    words = _TEXT.sub(r" \1 ", plain).split()
    if len(words) > 20 or not all(re.fullmatch(r"[A-Za-z-]+\.?", word) for word in words):
        return None
    for end in range(len(words), 0, -1):
        value = words_value(" ".join(words[:end]))
        if value is not None:
            rest = {word.lower().strip(".-") for word in words[end:]}
            if rest & (_NO_UNITS | DIGIT_WORDS):
                return None
            return value, f"{value}{'%' * bool(_PERCENT.match(' '.join(words[end:])))}"
    return None
