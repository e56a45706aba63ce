"""A study of what an answer lacks, knowledge or selection: slips in written sums against plans that are wrong.

A *slip* is an equation `a + b = c` in an answer whose c is not the value of its left side. The embedded SLM was made to slip;
whatever else is wrong in an answer (the plan, a number misread) is not a matter of selecting a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from s2t.core.stats import bootstrap_interval
from s2t.files import read_jsonl
from s2t.studies.lab import Chart, Findings, Lab, Series

_NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
_EQUATION = re.compile(rf"({_NUMBER})((?:\s*[-+*/]\s*{_NUMBER})+)\s*=\s*\$?({_NUMBER})")
_TERM = re.compile(rf"\s*([-+*/])\s*({_NUMBER})")


def knowledge(lab: Lab) -> Findings:
    """Slips and other faults in the answers of greedy, s2t-local, s2t and the LLM, and which ones selecting repairs."""
    adapter, calibration = str(lab.trained()), str(lab.calibrated())
    lab.evaluated("eval", "greedy,s2t-local,s2t,llm", adapter=adapter, calibration=calibration)
    results = read_jsonl(lab.folder / "eval" / "results.jsonl")
    by_name: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["strategy"], {})[result["problem_id"]] = result
    rows, bars = [], []
    for name, answers in by_name.items():
        sums = [equations(answer["text"]) for answer in answers.values()]
        faults = [fault(answer) for answer in answers.values()]
        total = sum(len(found) for found in sums)
        slips = sum(not is_right for found in sums for is_right in found)
        shares = [faults.count(kind) / len(faults) for kind in ("none", "slip", "other")]
        rows.append((name, total, slips / max(total, 1), *shares))
        for kind, share in zip(("right", "wrong with a slip", "wrong without one"), shares, strict=True):
            wanted = {"right": "none", "wrong with a slip": "slip", "wrong without one": "other"}[kind]
            interval = bootstrap_interval([float(f == wanted) for f in faults])
            bars.append(Series(f"{name}: {kind}", [0.0], [share], [interval]))
    columns = (
        "strategy",
        "equations",
        "wrong equations %",
        "right answers %",
        "wrong with a slip %",
        "wrong without one %",
    )
    notes = [_repairs(by_name, name) for name in ("s2t-local", "s2t", "llm")]
    return Findings("Slips and other faults", columns, rows, Chart("", "answers (%)", bars, "bar"), notes)


def equations(text: str) -> list[bool]:
    """Whether each written equation of a text holds, in order; left sides follow the precedence of * and /."""
    return [
        _value(found[1], _TERM.findall(found[2])) == _number(found[3])
        for found in _EQUATION.finditer(text)
        if not _divides_by_zero(_TERM.findall(found[2]))
    ]


def fault(answer: Mapping[str, Any]) -> str:
    """`none` for a right answer; else `slip` where an equation of it is wrong, else `other`."""
    if answer["is_correct"]:
        return "none"
    return "other" if all(equations(answer["text"])) else "slip"


def _repairs(by_name: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str) -> str:
    """How many of greedy's faults of each kind a strategy repairs, and what it breaks."""
    greedy, other = by_name["greedy"], by_name[name]
    kinds = {key: fault(answer) for key, answer in greedy.items()}
    parts = []
    for kind, words in (("slip", "answers with a slip"), ("other", "answers wrong without one")):
        keys = [key for key, found in kinds.items() if found == kind]
        repaired = sum(other[key]["is_correct"] for key in keys)
        parts.append(f"{repaired} of {len(keys)} {words} ({100 * repaired / max(len(keys), 1):.0f} %)")
    right = [key for key, found in kinds.items() if found == "none"]
    broken = sum(not other[key]["is_correct"] for key in right)
    return f"{name} repairs {parts[0]} and {parts[1]} of greedy's, and breaks {broken} of {len(right)} right ones."


def _divides_by_zero(terms: Sequence[tuple[str, str]]) -> bool:
    return any(sign == "/" and _number(number) == 0 for sign, number in terms)


def _value(first: str, terms: Sequence[tuple[str, str]]) -> Fraction:
    total, product, sign = Fraction(0), _number(first), 1
    for operator, text in terms:
        number = _number(text)
        if operator in "*/":
            product = product * number if operator == "*" else product / number
        else:
            total += sign * product
            product, sign = number, 1 if operator == "+" else -1
    return total + sign * product


def _number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))
