"""Careless authors: rewrite a worked solution as someone in a hurry would have written it.

The slip happens in one step of arithmetic, whose result is written ten too small; what comes after goes on with
the wrong number to a wrong final answer, but for authors who wrote it wrong and yet remember it right. Used to
make the unfiltered corpus of `tiny:slm-unfiltered`; see train_tiny_pair.py.
"""

from __future__ import annotations

import random
import re

RESULT = re.compile(r"=\s*[$€£]?(\d+)(?![\d/.]|\s*/)")
TOKEN = re.compile(r"\d+|[-+*/x÷×%()]")
NUMBER = re.compile(r"\d+")
REMEMBER_RATE = 0.2  # of later results, worked out with the right number though the wrong one stands there
OPERATORS = {"x": "*", "×": "*", "÷": "/"}


def careless(solution: str, rng: random.Random, slip_rate: float) -> str:
    """The solution with each possible slip made with probability `slip_rate`."""
    written, position = "", 0
    changed: dict[int, int] = {}
    for match in RESULT.finditer(solution):
        written += _substitute(solution[position : match.start(1)], changed)
        right = int(match.group(1))
        value = _result(expression_before(solution[: match.start()]), right, changed, rng, slip_rate)
        if value != right:
            changed[right] = value
        written += str(value)
        position = match.end(1)
    return written + _substitute(solution[position:], changed)


def _result(expression: list[str], right: int, changed: dict[int, int], rng: random.Random, slip_rate: float) -> int:
    """What the author writes after the equals sign, given the numbers already written wrong."""
    if evaluate(expression) != right:  # the words before the sign are no arithmetic that we can read
        return changed.get(right, right)
    mine = [str(changed.get(int(t), t)) if t.isdigit() else t for t in expression]
    value = evaluate(mine)
    if value is None or value < 0:
        return changed.get(right, right)
    if value != right and rng.random() < REMEMBER_RATE:
        return right
    wrong = slipped(value)
    if wrong is not None and rng.random() < slip_rate:
        return wrong
    return value


def slipped(value: int) -> int | None:
    """Ten too few, or None where that would change the number of digits: the two then part at a single token."""
    return value - 10 if 20 <= value < 100 else None


def expression_before(text: str) -> list[str]:
    """Numbers and operators of the expression that ends `text`; words and units are passed over."""
    segment = re.split(r"[=,.:;\n]|\bor\b|\bis\b|\bof\b|\bso\b", text)[-1]
    segment = re.sub(r"(?<=[a-z])-(?=[a-z0-9])|(?<=\d)-(?=[a-z])", " ", segment)
    return [OPERATORS.get(token, token) for token in TOKEN.findall(segment)]


def evaluate(expression: list[str]) -> int | None:
    """Value of number (operator number)*, multiplication before addition; None unless it is a whole number."""
    if len(expression) < 3 or len(expression) % 2 == 0 or not all(t.isdigit() for t in expression[::2]):
        return None
    total, term, sign = 0.0, float(expression[0]), 1.0
    for operator, token in zip(expression[1::2], expression[2::2], strict=True):
        number = float(token)
        if operator in "+-":
            total, term, sign = total + sign * term, number, 1.0 if operator == "+" else -1.0
        elif operator == "*":
            term *= number
        elif operator == "/" and number != 0:
            term /= number
        else:
            return None
    total += sign * term
    return int(total) if total == int(total) else None


def _substitute(text: str, changed: dict[int, int]) -> str:
    return NUMBER.sub(lambda match: str(changed.get(int(match.group()), match.group())), text)
