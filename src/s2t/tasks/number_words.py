"""Numbers in English words: "minus twenty-one", "two and a half million", "three quarters"; every word has to have its place.

Knows no digits.
"""

from __future__ import annotations

from fractions import Fraction

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_TEENS = "seventeen eighteen nineteen"
_ONES = {word: value for value, word in enumerate(f"{_SMALL} {_TEENS}".split())}
_TENS_NAMES = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 20 + 10 * at for at, word in enumerate(_TENS_NAMES.split())} | {"fourty": 40}
_SCALES = {
    "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
    "lakh": 10**5, "crore": 10**7, "dozen": 12, "mln": 10**6, "mn": 10**6, "bn": 10**9,
}  # fmt: skip
_PARTS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10, "twentieth": 20, "hundredth": 100, "thousandth": 1000, "millionth": 10**6,
}  # fmt: skip
_ARTICLES = ("a", "an")

DIGIT_WORDS = frozenset(_ONES) | frozenset(_TENS)


def words_value(text: str) -> Fraction | None:
    """The value of a number in words; None for all else."""
    tokens = text.strip(" .").casefold().replace("-", " ").split()
    if tokens[:1] in (["minus"], ["negative"]):
        value = _value(tokens[1:])
        return None if value is None else -value
    return _value(tokens)


def scale_of(word: str) -> Fraction | None:
    """What a word behind a numeral multiplies it by: "million", "hundred", "tenths"; None for another word."""
    word = word.lower().strip(".,")
    single = word.removesuffix("s")
    scales = _SCALES | {"hundred": 100}
    if word in scales or single in scales:
        return Fraction(scales.get(word, scales.get(single, 1)))
    if word.endswith("s") and single in _PARTS and single != "quarter":  # 3 quarters may be coins
        return Fraction(1, _PARTS[single])
    return None


def _value(tokens: list[str]) -> Fraction | None:
    if not tokens:
        return None
    if "point" in tokens:
        return _decimal(tokens)
    last = tokens[-1]
    if last in _PARTS or last.removesuffix("s") in _PARTS:
        return _parts(tokens[:-1], _PARTS[last if last in _PARTS else last.removesuffix("s")], last == "half")
    if last in _SCALES and "and" in tokens and (head := _value(tokens[:-1])) is not None and head.denominator > 1:
        return head * _SCALES[last]  # two and a half million
    return _whole(tokens)


def _decimal(tokens: list[str]) -> Fraction | None:
    """ "three point one four"."""
    place = tokens.index("point")
    whole, digits = _whole(tokens[:place]), [_ONES.get(word, 10) for word in tokens[place + 1 :]]
    if whole is None or not digits or max(digits) > 9:
        return None
    return whole + Fraction("0." + "".join(map(str, digits)))


def _parts(tokens: list[str], under: int, is_half: bool) -> Fraction | None:
    """ "three quarters", "half", "seven and a half"."""
    if not tokens:
        return Fraction(1, under) if is_half else None
    whole = Fraction(0)
    if "and" in tokens:
        place = len(tokens) - 1 - tokens[::-1].index("and")
        found = _whole(tokens[:place])
        if found is None:
            return None
        whole, tokens = found, tokens[place + 1 :]
    count = Fraction(1) if tokens in (["a"], ["an"]) else _whole(tokens)
    return None if count is None else whole + count / under


def _whole(tokens: list[str]) -> Fraction | None:
    """A whole number: groups below a thousand, each with its scale, the largest first."""
    total, group, last = Fraction(0), [], 10**18
    for word in tokens:
        scale = _SCALES.get(word, _SCALES.get(word.removesuffix("s")))
        if scale is None:
            group.append(word)
            continue
        value = _group(group, has_scale=True)
        if value is None or scale >= last:
            return None
        total, group, last = total + value * scale, [], scale
    if not group:
        return total if last < 10**18 else None
    value = _group(group, has_scale=False) if group[0] != "and" or total else None
    return None if value is None else total + value


def _group(tokens: list[str], has_scale: bool) -> int | None:
    """A number below ten thousand: "twelve hundred", "one hundred and five"."""
    words = [word for word in tokens if word != "and"]
    if not words or tokens[-1] == "and":
        return None
    place = next((at for at, word in enumerate(words) if word in ("hundred", "hundreds")), None)
    if place is None:
        return _below_hundred(words, has_scale)
    hundreds = _below_hundred(words[:place], True)
    rest = _below_hundred(words[place + 1 :], False) if words[place + 1 :] else 0
    return None if not hundreds or rest is None else 100 * hundreds + rest


def _below_hundred(words: list[str], may_be_article: bool) -> int | None:
    if len(words) == 1:
        if words[0] in _ARTICLES:
            return 1 if may_be_article else None
        return _ONES.get(words[0], _TENS.get(words[0]))
    if len(words) == 2 and words[0] in _TENS and 0 < _ONES.get(words[1], 0) < 10:
        return _TENS[words[0]] + _ONES[words[1]]
    return None
