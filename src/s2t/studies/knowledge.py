"""A study of what an answer lacks, knowledge or selection: slips in written sums against plans that are wrong.

A *slip* is an equation `a + b = c` in an answer whose c is not the value of its left side. The embedded SLM was made to slip;
whatever else is wrong in an answer (the plan, a number misread) is not a matter of selecting a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from s2t.core.stats import bootstrap_interval
from s2t.files import read_jsonl
from s2t.model.lora import distilled_from
from s2t.studies.lab import Chart, Findings, Lab, Series

_NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
EQUATION = re.compile(rf"({_NUMBER})((?:\s*[-+*/]\s*{_NUMBER})+)\s*=\s*\$?({_NUMBER})")
_FRACTION = re.compile(r"\s*/|\.\d|\d")
_OPEN = re.compile(r"(?:[-+*/x×÷]|\bof)\s*[$€£]?$")
_TERM = re.compile(rf"\s*([-+*/])\s*({_NUMBER})")


def knowledge(lab: Lab) -> Findings:
    """Slips and other faults of greedy, s2t-local, s2t, the LLM and distilled SLMs, and which of greedy's each one repairs."""
    adapter, calibration = str(lab.trained()), str(lab.calibrated())
    lab.evaluated("eval", "greedy,s2t-local,s2t,llm", adapter=adapter, calibration=calibration)
    by_name = _by_strategy(lab, "eval")
    distilled = {}
    names = distilled_rows(lab.config.distilled_names)
    for slm, name in names:
        folder = f"eval-{''.join(c if c.isalnum() else '-' for c in name)}"
        lab.evaluated(folder, "greedy", slm=slm)
        distilled[name] = _by_strategy(lab, folder)["greedy"]
    by_name |= distilled
    rows, bars = [], []
    for name, answers in by_name.items():
        sums = [equations(answer["text"]) for answer in answers.values()]
        faults = [fault(answer) for answer in answers.values()]
        total = sum(len(found) for found in sums)
        slips = sum(not is_right for found in sums for is_right in found)
        shares = [faults.count(kind) / len(faults) for kind in ("none", "slip", "other")]
        rows.append((name, total, slips / max(total, 1), *shares, *_repaired(by_name["greedy"], answers)))
        for kind, share in zip(("right", "wrong with a slip", "wrong without one"), shares, strict=True):
            wanted = {"right": "none", "wrong with a slip": "slip", "wrong without one": "other"}[kind]
            interval = bootstrap_interval([float(f == wanted) for f in faults])
            bars.append(Series(f"{name}: {kind}", [0.0], [share], [interval]))
    columns = (
        *(
            "strategy",
            "equations",
            "wrong equations %",
            "right answers %",
            "wrong with a slip %",
            "wrong without one %",
        ),
        *("greedy's slips repaired %", "greedy's other faults repaired %", "greedy's right answers broken %"),
    )
    kinds = [fault(answer) for answer in by_name["greedy"].values()]
    notes = [f"Of greedy's answers {kinds.count('slip')} are wrong with a slip and {kinds.count('other')} without one."]
    notes += [_overlap(by_name, "s2t-local", name) for name in distilled]
    notes += [f"{name} is {slm}." for slm, name in names]
    return Findings("Slips and other faults", columns, rows, Chart("", "answers (%)", bars, "bar"), notes)


def distilled_rows(slms: Sequence[str]) -> list[tuple[str, str]]:
    """Every distilled SLM and the name of its row: its method, numbered in the given order where several have the same."""
    methods = [str((distilled_from(slm) or {}).get("method", slm)) for slm in slms]
    counts = [methods[: place + 1].count(method) for place, method in enumerate(methods)]
    return [
        (slm, f"{method}-{number}" if methods.count(method) > 1 else method)
        for slm, method, number in zip(slms, methods, counts, strict=True)
    ]


def equations(text: str) -> list[bool]:
    """Whether each written equation of a text holds, in order; left sides follow the precedence of * and /."""
    return [_number(found[3]) == _number(wanted) for found, wanted in written_sums(text)]


def fault(answer: Mapping[str, Any]) -> str:
    """`none` for a right answer; else `slip` where an equation of it is wrong, else `other`."""
    if answer["is_correct"]:
        return "none"
    return "other" if all(equations(answer["text"])) else "slip"


def written_sums(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Every equation of a text that says what its result has to be: (match, the right digits); its third group is the result.

    Passed over are fractions for a result (`= 1/5`), left sides that begin behind an operator in words (`84 pages x 3/4`), and
    quotients of whole numbers that are none, which authors round (`42 / 12 = 4 trays`).
    """
    for found in EQUATION.finditer(text):
        if _FRACTION.match(text, found.end()) or _OPEN.search(text[: found.start()]):
            continue
        wanted = _right_digits(found)
        if wanted is not None and ("." in found[0] or "." not in wanted):
            yield found, wanted


def _right_digits(found: re.Match[str]) -> str | None:
    """The digits that belong behind the equals sign; None where nothing is equal or they are more than four decimals."""
    terms = _TERM.findall(found[2])
    if _divides_by_zero(terms):
        return None
    value = 10_000 * _value(found[1], terms)
    if value.denominator != 1:
        return None
    sign, whole, part = "-" if value < 0 else "", abs(int(value)) // 10_000, abs(int(value)) % 10_000
    return f"{sign}{whole}" + (f".{part:04d}".rstrip("0") if part else "")


_Answers = Mapping[str, Mapping[str, Any]]
"""Results of one strategy by problem id."""


def _by_strategy(lab: Lab, folder: str) -> dict[str, _Answers]:
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in read_jsonl(lab.folder / folder / "results.jsonl"):
        found.setdefault(result["strategy"], {})[result["problem_id"]] = result
    return dict(found)


def _repaired(greedy: _Answers, other: _Answers) -> list[float | None]:
    """Shares of greedy's slips and other faults that are right in `other`, and of its right answers that are wrong there."""
    shares: list[float | None] = []
    for kind in ("slip", "other", "none"):
        keys = [key for key, answer in greedy.items() if fault(answer) == kind]
        changed = sum(bool(other[key]["is_correct"]) != (kind == "none") for key in keys)
        shares.append(changed / len(keys) if keys else None)
    return shares


def _overlap(by_name: Mapping[str, _Answers], left: str, right: str) -> str:
    """Which of greedy's faults both repair, and which only one of the two."""
    parts = []
    for kind, words in (("slip", "answers with a slip"), ("other", "answers wrong without one")):
        keys = [key for key, answer in by_name["greedy"].items() if fault(answer) == kind]
        repaired = [(bool(by_name[left][key]["is_correct"]), bool(by_name[right][key]["is_correct"])) for key in keys]
        counts = [repaired.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
        parts.append(
            f"of {len(keys)} {words} both repair {counts[0]}, only {left} {counts[1]}, only {right} {counts[2]}, "
            f"neither {counts[3]}"
        )
    return f"{left} and {right}: {'; '.join(parts)}."


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
