"""Arithmetic that is exact while it can be: on fractions, else on numbers of mpmath at its working precision.

Part of the judge's script. Knows no text; `_algebra.py` builds formulas out of it.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from fractions import Fraction
from typing import Any

from mpmath import mp

Value = Any  # a Fraction where exact, else a number of mpmath

Signs = ContextVar("Signs", default=False)  # whether a fractional power of a negative number has no value
_MAX_BITS = 200_000  # of an exact power; larger ones are evaluated to many digits
_MAX_EXACT = 5_000  # argument of an exact factorial or binomial


class Unreadable(ValueError):
    """The text is no expression, or not all of it is; or it has no value where one is needed."""


def to_mp(value: Value) -> Value:
    """The value as a number of mpmath."""
    return mp.mpf(value.numerator) / value.denominator if isinstance(value, (Fraction, int)) else value


def _pair(left: Value, right: Value) -> tuple[Value, Value]:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left, right
    return to_mp(left), to_mp(right)


def add(left: Value, right: Value) -> Value:
    """The sum."""
    left, right = _pair(left, right)
    return left + right


def subtract(left: Value, right: Value) -> Value:
    """The difference."""
    left, right = _pair(left, right)
    return left - right


def multiply(left: Value, right: Value) -> Value:
    """The product."""
    left, right = _pair(left, right)
    return left * right


def divide(left: Value, right: Value) -> Value:
    """The quotient; ZeroDivisionError where there is none."""
    left, right = _pair(left, right)
    return left / right


def power(base: Value, exponent: Value) -> Value:
    """The power, exact where it is rational and of bounded size."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(exponent) * bits <= _MAX_BITS:
                return base**exponent.numerator
        elif (found := _exact_root(base, exponent.denominator)) is not None:
            return power(found, Fraction(exponent.numerator))
    if Signs.get() and not isinstance(base, mp.mpc) and base < 0 and not _is_whole(exponent):
        raise Unreadable("a root of a negative number, which has several")
    return mp.power(to_mp(base), to_mp(exponent))


def _is_whole(value: Value) -> bool:
    number = value if isinstance(value, Fraction) else _nearest(value)
    return number is not None and number.denominator == 1


def root(value: Value, degree: Value) -> Value:
    """The root of a degree; real for a negative number where the degree is odd."""
    if isinstance(degree, Fraction) and degree.denominator == 1:
        if isinstance(value, Fraction) and (found := _exact_root(value, degree.numerator)) is not None:
            return found
        if degree % 2 and not isinstance(value, mp.mpc) and value < 0:
            return -root(-value, degree)  # real, as schools have it
    return power(value, divide(Fraction(1), degree))


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The rational root of a rational number that is not negative; None where there is none."""
    if value < 0 or not 0 < degree < 1000:
        return None
    parts = []
    for part in (value.numerator, value.denominator):
        if part.bit_length() > _MAX_BITS:
            return None
        low, high = 0, 1 << (part.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= part else (low, middle - 1)
        if low**degree != part:
            return None
        parts.append(low)
    return Fraction(*parts)


def whole(value: Value) -> int:
    """The whole number that a value is; Unreadable for another, and for one too large to count to."""
    number = value if isinstance(value, Fraction) else _nearest(value)
    if number is None or number.denominator != 1:
        raise Unreadable("no whole number")
    return int(number)


def _nearest(value: Value) -> Fraction | None:
    """The whole number that a value is but for the last digits."""
    if isinstance(value, mp.mpc) or not mp.isfinite(value) or mp.mag(value) > 10_000:
        return None
    near = mp.nint(value)
    return Fraction(int(near)) if abs(value - near) <= mp.mpf(10) ** (-mp.dps // 2) else None


def floor(value: Value) -> Value:
    """The largest whole number up to a value."""
    if isinstance(value, Fraction):
        return Fraction(math.floor(value))
    near = _nearest(value)
    return mp.floor(value) if near is None else near


def ceiling(value: Value) -> Value:
    """The smallest whole number from a value on."""
    return -floor(-value)


def factorial(value: Value) -> Value:
    """The factorial, or gamma of one more."""
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= _MAX_EXACT:
        return Fraction(math.factorial(int(value)))
    return mp.gamma(to_mp(value) + 1)


def binomial(over: Value, under: Value) -> Value:
    """The binomial coefficient."""
    whole = all(isinstance(part, Fraction) and part.denominator == 1 for part in (over, under))
    if whole and 0 <= under <= _MAX_EXACT and 0 <= over <= _MAX_EXACT:
        return Fraction(math.comb(int(over), int(under)))
    return mp.binomial(to_mp(over), to_mp(under))


def logarithm(value: Value, base: Value) -> Value:
    """The logarithm to a base."""
    return mp.log(to_mp(value)) / mp.log(to_mp(base))
