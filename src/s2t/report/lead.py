"""What the report opens with: sentences that say what came out, and one answer that a strategy repaired.

Reads summary.json and the packed traces. Everything here is text; the template lays it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2t.config import NEEDS_LLM
from s2t.report.trace import PROBABILITY_PRECISION, Traces, unpack

_FIRST = ("s2t-local", "s2t", "takeover")
_LEVEL = 0.05
_BEFORE, _AFTER = 80, 120  # tokens of an answer shown around a flip
_OFFERED = 5


def sentences(summary: Mapping[str, Any], measured: Mapping[str, Any] | None) -> list[str]:
    """What came out, the most important first: who is right how often, at what cost, and how much there was to gain."""
    strategies = summary["strategies"]
    known = [name for name in _FIRST if name in strategies]
    name = [*known, *(other for other in strategies if other != "greedy"), *strategies][0]
    said = [_outcome(name, summary)]
    if "greedy" in strategies and name != "greedy":
        said.append(_cost(name, strategies[name], strategies["greedy"]))
    if name == "s2t-local" and summary.get("gap_closed") is not None and "s2t" in strategies:
        gap = _share_of(summary["gap_closed"], 0)
        said.append(
            f"With the LLM at hand, s2t gets {_percent(strategies['s2t'])} right; s2t-local goes {gap} of that way."
        )
    curve = measured or summary.get("sufficiency") or {}
    if (hit := (curve.get("hit_rate") or {}).get("8")) is not None:
        said.append(f"At {_share_of(hit)} of the divergence points the LLM's token is among the SLM's first eight.")
    return said


def _outcome(name: str, summary: Mapping[str, Any]) -> str:
    strategies, count = summary["strategies"], f"{summary['num_test']:,}"
    test = (summary.get("paired") or {}).get(f"{name} vs greedy")
    if name == "greedy" or "greedy" not in strategies:
        return f"On {count} test problems {name} gets {_percent(strategies[name])} right{_interval(strategies[name])}."
    start = f"On {count} test problems {name} gets {_percent(strategies[name])} right, greedy {_percent(strategies['greedy'])}"
    if test is None:
        return f"{start}."
    points = round(100 * test["difference"], 1)
    if points == 0:
        return f"{start}: no difference{_interval(test, 'points')}."
    more = f"{abs(points):.1f} points {'more' if points > 0 else 'fewer'}"
    p = test.get("p_holm", test.get("p_value"))
    chance = f", which may be chance (p = {p:.2f})" if p is not None and p >= _LEVEL else ""
    return f"{start}: {more}{_interval(test, 'points')}{chance}."


def _cost(name: str, scores: Mapping[str, Any], greedy: Mapping[str, Any]) -> str:
    llm, slm = scores.get("llm_forwards") or 0, scores.get("slm_forwards") or 0
    ratio = slm / greedy["slm_forwards"] if greedy.get("slm_forwards") else None
    times = "" if ratio is None else f"{ratio:.2f} times the SLM forwards of greedy"
    if llm or name.partition("@")[0] in NEEDS_LLM:
        return f"It asks the LLM: {llm:,} forwards{f', beside {times}' if slm and times else ''}."
    return f"It needs no LLM{f', and {times}' if times else ''}."


def _percent(scores: Mapping[str, Any]) -> str:
    return _share_of(scores["accuracy"])


def _share_of(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _interval(found: Mapping[str, Any], unit: str = "%") -> str:
    bounds = found.get("ci95")
    if not bounds:
        return ""
    low, high = (f"{100 * bound:.1f}".replace("-", "−") for bound in bounds)
    return f" (95\N{NO-BREAK SPACE}% interval {low} to {high} {unit})"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of an answer: plain, or with the token `instead` of which it was taken (a flip), or where it turns wrong."""

    text: str
    kind: str = "plain"
    instead: str = ""


@dataclass(frozen=True, slots=True)
class Repaired:
    """One problem that greedy gets wrong and a strategy gets right, with the flips that made the difference."""

    strategy: str
    question: str
    gold: str
    greedy_answer: str
    answer: str
    greedy: list[Part]
    repaired: list[Part]
    offered: list[tuple[str, str, bool]]
    """What the SLM offered at the first flip: token, its probability, whether it was taken."""


def repaired(traces: Traces | None) -> Repaired | None:
    """The shortest answer that greedy gets wrong and a strategy repairs with the fewest flips; None where there is none."""
    if traces is None or "greedy" not in traces.index["strategies"]:
        return None
    names = traces.index["strategies"]
    greedy = names.index("greedy")
    order = [name for name in _FIRST if name in names] + [name for name in names if name not in ("greedy", *_FIRST)]
    for name in order:
        place = names.index(name)
        if (problem := _telling(traces.index["scores"][greedy], traces.index["scores"][place])) is not None:
            return _example(traces, greedy, place, problem)
    return None


def _telling(greedy: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]]) -> int | None:
    found = [
        (flips, tokens, problem)
        for problem, (flips, tokens) in enumerate(zip(other["flips"], other["tokens"], strict=True))
        if flips and other["correct"][problem] == 1 and greedy["correct"][problem] == 0
    ]
    return min(found)[2] if found else None


def _example(traces: Traces, greedy: int, place: int, problem: int) -> Repaired:
    index = traces.index
    block, row = divmod(problem, index["blockSize"])
    wrong, right = (unpack(traces.blocks[f"{strategy}-{block}"])[row] for strategy in (greedy, place))
    pieces = [text for _, text in unpack(traces.blocks["pieces"])]
    apart = next((i for i, (a, b) in enumerate(zip(wrong["t"], right["t"], strict=False)) if a != b), right["x"][0])
    first = right["x"][0]
    return Repaired(
        strategy=index["strategies"][place],
        question=index["questions"][problem],
        gold=index["golds"][problem],
        greedy_answer=index["scores"][greedy]["answer"][problem] or "none",
        answer=index["scores"][place]["answer"][problem] or "none",
        greedy=_parts(
            wrong["t"],
            pieces,
            first,
            {apart: Part(pieces[wrong["t"][apart]], "turn")} if apart < len(wrong["t"]) else {},
        ),
        repaired=_parts(right["t"], pieces, first, dict(_flips(right, pieces))),
        offered=_offered(right, pieces, first),
    )


def _flips(run: Mapping[str, Any], pieces: Sequence[str]) -> Iterator[tuple[int, Part]]:
    for step in run["x"]:
        greedy = run["g"].get(str(step))
        yield step, Part(pieces[int(run["t"][step])], "flip", pieces[int(greedy)] if greedy is not None else "")


def _parts(tokens: Sequence[int], pieces: Sequence[str], first: int, marked: Mapping[int, Part]) -> list[Part]:
    """The answer around the first flip, marked tokens on their own; `…` stands for what is left out."""
    start, end = max(0, first - _BEFORE), min(len(tokens), first + _AFTER)
    found, plain = [], "…" if start else ""
    for step in range(start, end):
        if step not in marked:
            plain += pieces[tokens[step]]
            continue
        found += [Part(plain), marked[step]] if plain else [marked[step]]
        plain = ""
    plain += "…" if end < len(tokens) else ""
    return [*found, Part(plain)] if plain else found


def _offered(run: Mapping[str, Any], pieces: Sequence[str], step: int) -> list[tuple[str, str, bool]]:
    candidates = run["c"].get(str(step))
    if candidates is None or not candidates[1]:
        return []
    places, probs, _, _, chosen = candidates
    shown = [i for i in range(len(places)) if i < _OFFERED or i == chosen]
    return [(pieces[int(places[i])], _share(probs[i]), i == chosen) for i in shown]


def _share(scaled: int | None) -> str:
    return "–" if scaled is None else f"{100 * scaled / PROBABILITY_PRECISION:.1f} %"
