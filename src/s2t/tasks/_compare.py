"""Whether two formulas have one value: in numbers to many digits, with variables at several points.

Part of the judge's script. Two numbers are equal when their difference vanishes as the precision grows, so 1/2^2024
is not 1/2^2023, and sin(pi) is 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import _exact as exact  # pyright: ignore[reportMissingImports]  (scripts beside this one)
from _algebra import Env, Formula, Unreadable, parse, point_of  # pyright: ignore[reportMissingImports]
from mpmath import mp

_DIGITS = ((300, 1000), (60, 200))  # rough and fine, without variables and with them
_KINDS, _KINDS_OF_STEPS = 4, 24  # of real points; whole numbers are tried where those have no value
_NEGATIVE = 3  # the kind of point below zero
_WHOLE = (-5, -12, -19, -33)
_MIN_POINTS = 2
_FOR_THE_LIBRARY = re.compile(r"\\(?:int|lim|sum|prod)(?![A-Za-z])")
_NOT_FOR_THE_LIBRARY = re.compile(r"'|\^\{?(?:T|\\top)|\\p?mod|[0-9)]\s*\(")  # it skips or misreads them


def read(text: str) -> Formula:
    """The formula that a text is; integrals, limits and endless series are left to latex2sympy."""
    try:
        return parse(text)
    except Unreadable:
        if _FOR_THE_LIBRARY.search(text) and not _NOT_FOR_THE_LIBRARY.search(text):
            return _by_library(text)
        raise


def is_equal(left: Formula, right: Formula, is_rounded: bool = False) -> bool:
    """Whether the formulas are equal; `is_rounded` says that one of them is a decimal, of which six places are enough."""
    names = left.symbols | right.symbols
    if not names:
        return _is_same(left, right, {}, _DIGITS[0]) or (is_rounded and _agrees_rounded(left, right))
    tried = [_is_same(left, right, env, _DIGITS[1]) for env in _points(names, (left, right))]
    return len(tried) >= _MIN_POINTS and all(tried)


def proportion(first: tuple[Formula, Formula], second: tuple[Formula, Formula]) -> int:
    """The sign of the constant factor between the differences of two pairs of sides; 0 where there is none."""
    formulas = (*first, *second)
    names = frozenset().union(*(formula.symbols for formula in formulas))
    factor = None
    count = 0
    with mp.workdps(_DIGITS[1][1]):
        for env in _points(names, formulas):
            one, other = (
                exact.to_mp(exact.subtract(sides[0].value(env), sides[1].value(env))) for sides in (first, second)
            )
            if factor is None:
                factor = other / one
            if isinstance(factor, mp.mpc) or abs(one * factor - other) > mp.mpf(10) ** -50 * abs(other):
                return 0
            count += 1
    return 0 if factor is None or count < _MIN_POINTS or not names else int(mp.sign(factor))


def _points(names: frozenset[str], formulas: tuple[Formula, ...]) -> Iterator[Env]:
    """Values for the variables where every formula has one: real numbers, or whole ones where real ones will not do."""
    found = False
    count = _KINDS_OF_STEPS if any(formula.has_steps for formula in formulas) else _KINDS
    for kind in (*range(count), *(range(-_KINDS_OF_STEPS, 0) if count > _KINDS else _WHOLE)):
        if kind < 0 and found and count == _KINDS:
            return
        env = {name: point_of(name, kind) for name in names}
        if _has_values(formulas, env, is_real=kind == _NEGATIVE):
            found = found or kind >= 0
            yield env


def _has_values(formulas: tuple[Formula, ...], env: Env, is_real: bool) -> bool:
    """Whether all have a finite value; `is_real`: a real one, with no root of a negative number (it has several) on the way."""
    token = exact.Signs.set(is_real)
    try:
        values = [exact.to_mp(formula.value(env)) for formula in formulas]
    except (Unreadable, ZeroDivisionError):
        return False
    finally:
        exact.Signs.reset(token)
    return all(mp.isfinite(value) and not (is_real and mp.im(value)) for value in values)


def _is_same(left: Formula, right: Formula, env: Env, digits: tuple[int, int]) -> bool:
    rough, (one, other) = _difference(left, right, env, digits[0])
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    if any(mp.isinf(exact.to_mp(value)) for value in (one, other)):
        return exact.to_mp(one) == exact.to_mp(other)
    fine, (one, other) = _difference(left, right, env, digits[1])
    with mp.workdps(digits[1]):
        size = max(abs(exact.to_mp(one)), abs(exact.to_mp(other)))
        if mp.isnan(fine) or mp.isnan(size):
            return False
        return fine <= size * mp.mpf(10) ** -(digits[1] - 50) or fine <= rough * mp.mpf(10) ** -(digits[0] // 2)


def _difference(left: Formula, right: Formula, env: Env, digits: int) -> tuple[Any, tuple[Any, Any]]:
    """The distance of the two values at a precision, and the values."""
    with mp.workdps(digits):
        one, other = left.value(env), right.value(env)
        return abs(exact.to_mp(exact.subtract(one, other))), (one, other)


def _agrees_rounded(left: Formula, right: Formula) -> bool:
    """Equal in six decimals, and to one part in ten thousand: of a small number six decimals say too little."""
    with mp.workdps(40):
        one, other = (side.value({}) for side in (left, right))
        if any(isinstance(value, mp.mpc) or not mp.isfinite(exact.to_mp(value)) for value in (one, other)):
            return False
        if isinstance(one, Fraction) and isinstance(other, Fraction) and _has_end(one) and _has_end(other):
            return False  # both can be written down
        one, other = exact.to_mp(one), exact.to_mp(other)
        is_near = abs(one - other) * 10_000 <= max(abs(one), abs(other))
        return bool(is_near and mp.nint(one * 10**6) == mp.nint(other * 10**6))


def _has_end(number: Fraction) -> bool:
    """Whether a number has an end as a decimal."""
    rest = number.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    return rest == 1


def _by_library(text: str) -> Formula:
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    parsed: Any = latex2sympy(text, is_real=True, normalization_config=None, conversion_config=config)
    found = parsed.doit()
    if not found.is_number and not found.free_symbols:
        raise Unreadable("no number")
    by_name = {str(symbol): symbol for symbol in found.free_symbols}

    def value(env: Env) -> Any:
        numbers = {symbol: env[name].numerator / _sympy(env[name].denominator) for name, symbol in by_name.items()}
        return mp.mpmathify(found.subs(numbers).evalf(mp.dps))

    return Formula(value, frozenset(by_name))


def _sympy(number: int) -> Any:
    from sympy import Integer

    return Integer(number)
