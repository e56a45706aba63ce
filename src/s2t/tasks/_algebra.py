r"""Read an expression of TeX whole, or not at all, and evaluate it: numbers exactly, all else to many digits.

Part of the judge's script, for expressions that `expressions.py` has tidied. A formula with a part that is not
understood raises `Unreadable`; nothing is skipped and nothing guessed.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple

import _exact as exact  # pyright: ignore[reportMissingImports]  (a script beside this one)
from mpmath import mp

Unreadable = exact.Unreadable
Value = Any  # a Fraction where exact, else a number of mpmath
Env = dict[str, Value]
Expression = Callable[[Env], Value]

_MAX_TERMS = 20_000
_MAX_DEPTH = 40
_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc,
    "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "arccot": mp.acot, "arcsec": mp.asec, "arccsc": mp.acsc,
    "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "coth": mp.coth,
    "arsinh": mp.asinh, "arcosh": mp.acosh, "artanh": mp.atanh,
    "arcsinh": mp.asinh, "arccosh": mp.acosh, "arctanh": mp.atanh,
    "exp": mp.exp, "ln": mp.log, "log": mp.log10, "lg": mp.log10, "Gamma": mp.gamma, "zeta": mp.zeta, "cbrt": mp.cbrt,
}  # fmt: skip
_INVERSES = {name: f"arc{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
_OF_MANY = {"max": max, "min": min, "gcd": math.gcd, "lcm": math.lcm}
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "vartheta", "iota", "kappa", "lambda",
    "mu", "nu", "xi", "rho", "varrho", "sigma", "varsigma", "tau", "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma",
    "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell", "hbar", "mho", "aleph",
}  # fmt: skip
_ACCENTS = {"bar", "overline", "hat", "widehat", "vec", "tilde", "mathbb", "mathcal", "mathfrak", "overrightarrow"}
_UNKNOWN_FUNCTIONS = {"f", "g", "h", "F", "G", "\\phi", "\\varphi", "\\mho"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|[A-Za-z]|\S")
_STARTS = re.compile(r"[A-Za-z(\[{0-9.]|\\(?!cdot$|times$|div$|r[a-z]+$|end$|pmod$|bmod$|mod$).+")
_CLOSED_BY = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}


class Formula(NamedTuple):
    """An expression: what evaluates it, given a value for each of its variables."""

    value: Expression
    symbols: frozenset[str]
    has_steps: bool = False
    """Whether it is made of steps, which two formulas may share for a while."""


def parse(text: str) -> Formula:
    """The formula that the whole text is; `Unreadable` when any part of it is left."""
    reader = _Reader(_TOKEN.findall(text))
    value = reader.sum()
    if reader.token:
        raise Unreadable(f"left over: {reader.token}")
    return Formula(value, frozenset(reader.symbols), re.search(r"floor|ceil|m(?:ax|in)|gcd|lcm", text) is not None)


def point_of(name: str, kind: int) -> Fraction:
    """A value for a variable, always the same: real for a kind from 0 on (3: negative), whole for a negative kind."""
    share = Fraction(zlib.crc32(f"{name}/{kind}".encode()), 2**32)
    if kind < 0:
        return Fraction(int(6 * share) - kind)
    if kind < 4:
        return (1 + share, Fraction(1, 5) + share * Fraction(3, 5), 3 + 4 * share, -(Fraction(1, 2) + 2 * share))[kind]
    return 2 + 60 * share


class _Reader:
    """Recursive descent over the tokens of one text; every method takes what it reads."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at, self.depth, self.in_bars = 0, 0, 0
        self.symbols: set[str] = set()

    @property
    def token(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """The next token, which has to be one of the wanted ones where some are named."""
        found = self.token
        if not found or (wanted and found not in wanted):
            raise Unreadable(f"expected {' or '.join(wanted) or 'more'}, got {found or 'the end'}")
        self.at += 1
        return found

    def is_next(self, *wanted: str) -> bool:
        """Take the next token if it is one of these."""
        found = self.token in wanted
        self.at += found
        return found

    def sum(self) -> Expression:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise Unreadable("nested too deeply")
        value = self.signed(self.product)
        while self.token in ("+", "-"):
            sign = self.take()
            value = joined(exact.add if sign == "+" else exact.subtract, value, self.signed(self.product))
        self.depth -= 1
        return value

    def signed(self, read: Callable[[], Expression]) -> Expression:
        if self.is_next("-"):
            value = read()
            return lambda env: -value(env)
        self.is_next("+")
        return read()

    def product(self) -> Expression:
        value = self.mixed() or self.power()
        while self.token:
            if self.is_next("*", "\\cdot", "\\times"):
                value = joined(exact.multiply, value, self.signed(self.power))
            elif self.is_next("/", ":", "\\div"):
                value = joined(exact.divide, value, self.signed(self.power))
            elif self.is_factor():
                value = joined(exact.multiply, value, self.power())
            else:
                break
        return value

    def is_factor(self) -> bool:
        """Whether a factor follows without a sign; a number may not, behind another number or a letter."""
        if self.token[0] in "0123456789.":
            if re.fullmatch(r"[A-Za-z0-9.]+", self.tokens[self.at - 1]):
                raise Unreadable("two numbers side by side")
            return True
        if self.token == "|":
            return not self.in_bars
        return _STARTS.fullmatch(self.token) is not None

    def mixed(self) -> Expression | None:
        r"""A mixed number, "3\frac{1}{2}"; a whole number beside a fraction of numbers can be nothing else."""
        rest = "".join(self.tokens[self.at : self.at + 8])
        match = re.match(r"([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}", rest)
        if match is None:
            return None
        whole, over, under = (int(part) for part in match.groups())
        if over >= under:
            raise Unreadable("a mixed number with an improper fraction")
        self.at += 8
        return lambda env: whole + Fraction(over, under)

    def power(self) -> Expression:
        value = self.atom()
        while self.token in ("^", "!"):
            if self.is_next("!"):
                value = applied(exact.factorial, value)
                if self.token == "!":
                    raise Unreadable("a double factorial")
                continue
            self.take("^")
            if self.is_degree():
                continue
            value = joined(exact.power, value, self.exponent())
        if self.is_next("\\%"):
            return joined(exact.divide, value, lambda env: Fraction(100))
        return value

    def is_degree(self) -> bool:
        for form in (("\\circ",), ("\\degree",), ("{", "\\circ", "}")):
            if tuple(self.tokens[self.at : self.at + len(form)]) == form:
                self.at += len(form)
                return True
        return False

    def exponent(self) -> Expression:
        if self.token in ("{", "("):
            return self.atom()
        if self.is_next("-"):
            value = self.exponent()
            return lambda env: -value(env)
        value = self.atom()
        if self.is_next("^"):
            return joined(exact.power, value, self.exponent())
        return value

    def atom(self) -> Expression:
        token = self.take()
        if token in _CLOSED_BY:
            return self.bracketed(token)
        if token == "|":
            return self.absolute()
        if token[0] in "0123456789.":
            return constant(Fraction(token))
        if token.isalpha() and token.isascii():
            return self.letter(token)
        return self.command(token)

    def bracketed(self, opening: str) -> Expression:
        bars, self.in_bars = self.in_bars, 0
        value = self.sum()
        self.take(_CLOSED_BY[opening])
        self.in_bars = bars
        if opening.startswith("\\"):
            return applied(exact.floor if opening == "\\lfloor" else exact.ceiling, value)
        return value

    def absolute(self) -> Expression:
        self.in_bars += 1
        value = self.sum()
        self.take("|")
        self.in_bars -= 1
        return applied(abs, value)

    def letter(self, token: str) -> Expression:
        if token == "e" and self.token != "_":
            return lambda env: +mp.e
        name = token + self.subscript()
        if name in _UNKNOWN_FUNCTIONS and self.token == "(":
            return self.unknown_function(name)
        if name == "i":
            return lambda env: mp.mpc(0, 1)
        self.symbols.add(name)
        return lambda env: env[name]

    def subscript(self) -> str:
        """A subscript as it is written: it is a part of a name."""
        if not self.is_next("_"):
            return ""
        if not self.is_next("{"):
            return "_" + self.take()
        found, depth = [], 1
        while depth:
            token = self.take()
            depth += (token == "{") - (token == "}")
            found.append(token)
        return "_" + "".join(found[:-1])

    def unknown_function(self, name: str) -> Expression:
        """A function of which nothing is known: equal where its argument is."""
        argument = self.atom()
        factor = 1 + point_of(name, 0)
        return lambda env: mp.cos(exact.to_mp(argument(env)) * factor.numerator / factor.denominator) + mp.mpf(3) / 7

    def command(self, token: str) -> Expression:
        name = token[1:]
        if name in _READ_BY_NAME:
            return _READ_BY_NAME[name](self)
        if name in _FUNCTIONS and (name not in _GREEK or self.token == "("):
            return self.function(name)
        if name in _GREEK:
            return self.letter(token)
        if name in _ACCENTS:
            self.symbols.add(full := token + "".join(self.raw_group()) + self.subscript())
            return lambda env: env[full]
        raise Unreadable(f"unknown: {token}")

    def of_two(self, apply: Callable[[Value, Value], Value]) -> Expression:
        over = self.argument()
        return joined(apply, over, self.argument())

    def raw_group(self) -> list[str]:
        start = self.at
        self.argument()
        return self.tokens[start : self.at]

    def argument(self) -> Expression:
        r"""What a command takes: a group, or one letter or digit (`\frac12`)."""
        if self.token != "{" and re.fullmatch(r"[0-9]{2,}", self.token):
            first, self.tokens[self.at] = self.token[0], self.token[1:]
            return constant(Fraction(first))
        if self.token in ("(", "|"):
            raise Unreadable("a command without its braces")
        return self.atom()

    def root(self) -> Expression:
        degree: Expression = constant(Fraction(2))
        if self.is_next("["):
            degree = self.sum()
            self.take("]")
        return joined(exact.root, self.atom(), degree)

    def function(self, name: str) -> Expression:
        base = None
        if name == "log" and self.is_next("_"):
            base = self.argument_or_number()
        power: Expression | None = None
        if self.is_next("^"):
            if "".join(self.tokens[self.at : self.at + 4]) == "{-1}" and name in _INVERSES:
                self.at += 4
                name = _INVERSES[name]
            else:
                power = self.exponent()
                if base is None and name == "log" and self.is_next("_"):
                    base = self.argument_or_number()
        argument = self.atom() if self.token in ("(", "{", "[") else self.loose_argument()
        apply = _FUNCTIONS[name]
        value = applied(lambda found: apply(exact.to_mp(found)), argument)
        if base is not None:
            value = joined(exact.logarithm, argument, base)
        return value if power is None else joined(exact.power, value, power)

    def argument_or_number(self) -> Expression:
        return constant(Fraction(self.take())) if self.token.isdecimal() else self.argument()

    def loose_argument(self) -> Expression:
        r"""The argument without brackets: factors side by side, up to a bracket, an operator or a function."""
        value = self.signed(lambda: self.mixed() or self.power())
        while (
            self.token and self.token not in ("(", "[", "|") and self.token[1:] not in _FUNCTIONS and self.is_factor()
        ):
            value = joined(exact.multiply, value, self.power())
        return value

    def of_many(self, choose: Callable[..., Any]) -> Expression:
        closing = {"(": ")", "\\{": "\\}", "{": "}"}[self.take("(", "\\{", "{")]
        items = [self.sum()]
        while self.is_next(","):
            items.append(self.sum())
        self.take(closing)
        if choose in (max, min):
            return lambda env: choose(exact.to_mp(item(env)) for item in items)
        return lambda env: Fraction(choose(*(exact.whole(item(env)) for item in items)))

    def series(self, join: Callable[[Value, Value], Value]) -> Expression:
        self.take("_")
        self.take("{")
        index = self.take()
        self.take("=")
        first = self.sum()
        self.take("}")
        self.take("^")
        if "\\infty" in self.tokens[self.at : self.at + 3]:
            raise Unreadable("no end to the terms")
        last = self.atom()
        is_free = index in self.symbols
        body = self.product()
        if not is_free:
            self.symbols.discard(index)

        def value(env: Env) -> Value:
            low, high = exact.whole(first(env)), exact.whole(last(env))
            if high - low > _MAX_TERMS:
                raise Unreadable("too many terms")
            terms = (body({**env, index: Fraction(number)}) for number in range(low, high + 1))
            return reduce(join, terms, Fraction(0 if join is exact.add else 1))

        return value


_READ_BY_NAME: dict[str, Callable[[_Reader], Expression]] = {
    "pi": lambda _: lambda env: +mp.pi,
    "infty": lambda _: lambda env: mp.inf,
    "frac": lambda reader: reader.of_two(exact.divide),
    "binom": lambda reader: reader.of_two(exact.binomial),
    "sqrt": lambda reader: reader.root(),
    "sum": lambda reader: reader.series(exact.add),
    "prod": lambda reader: reader.series(exact.multiply),
    **{name: lambda reader, choose=choose: reader.of_many(choose) for name, choose in _OF_MANY.items()},
}


def constant(number: Fraction) -> Expression:
    """The expression that is a number."""
    return lambda env: number


def applied(apply: Callable[[Value], Value], value: Expression) -> Expression:
    """A function of an expression."""
    return lambda env: apply(value(env))


def joined(apply: Callable[[Value, Value], Value], left: Expression, right: Expression) -> Expression:
    """A function of two expressions."""
    return lambda env: apply(left(env), right(env))
