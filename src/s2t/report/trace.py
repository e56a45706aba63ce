"""Token traces for the page: traces.jsonl regrouped by problem, packed into compressed blocks, and an index of them.

Model text is untrusted. It reaches the page only as data: in a JSON script element in which no character can end the
element, and in base64. The page's script writes it with textContent alone, one problem at a time.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2t.errors import DataError
from s2t.files import iter_jsonl

PROBLEMS_PER_BLOCK = 32  # unpacked together: a few tens of kilobytes
PRECISION = 1000  # readings and scores are stored in thousandths
PROBABILITY_PRECISION = 10**6
UNITS = {"divergence": "nats", "entropy": "nats"}
_AUTO = {"takeover": "divergence", "s2t": "divergence", "s2t-local": "criticality"}
_IN_ORDER = ("divergence", "criticality", "entropy", "random")
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}  # U+2028 and U+2029: json escapes all non-ASCII


@dataclass(slots=True)
class Traces:
    """What the page's script gets: an index small enough to search, and blocks it unpacks when they are looked at.

    `index` has a row per problem in each of its columns; `blocks` maps the id of a script element to deflated JSON in
    base64. Block `STRATEGY-B` holds the runs of problems B * 32 and following, in the strategy's place in `index`;
    `prompts-B` their prompts; `pieces` the table of all token texts that runs point into.
    """

    index: dict[str, Any]
    blocks: dict[str, str]


@dataclass(slots=True)
class _Pieces:
    """Every distinct (token id, text), in order of first use; frequent ones come early and get small numbers."""

    places: dict[tuple[int, str], int] = field(default_factory=dict)

    def place(self, token_id: Any, text: Any) -> int:
        return self.places.setdefault((int(token_id), str(text)), len(self.places))

    def rows(self) -> list[tuple[int, str]]:
        return list(self.places)


@dataclass(slots=True)
class _Collected:
    """All lines of traces.jsonl so far: problems in order, and per strategy and problem its scores and packed steps."""

    problems: dict[str, dict[str, str]] = field(default_factory=dict)
    runs: dict[str, dict[str, tuple[dict[str, Any], str]]] = field(default_factory=dict)
    readings: dict[str, Counter[int]] = field(default_factory=dict)
    pieces: _Pieces = field(default_factory=_Pieces)

    def add(self, line: dict[str, Any], trigger: str) -> None:
        """Take one trace; raises KeyError, TypeError or ValueError for one that lacks or mistypes a field."""
        name, strategy = str(line["problem_id"]), str(line["strategy"])
        keys = {"question": "question", "gold": "gold", "prompt": "prompt_text"}
        problem = {key: str(line[source]) for key, source in keys.items()}
        run = _run(line["steps"], trigger, self.pieces)
        for measure, values in run["m"].items():
            self.readings.setdefault(measure, Counter()).update(value for value in values if value is not None)
        scores = _scores(line, run)
        self.problems.setdefault(name, problem)
        self.runs.setdefault(strategy, {})[name] = (scores, _json(run))


def load_traces(path: Path, config: dict[str, Any]) -> Traces | None:
    """Read traces.jsonl into what the page's script expects; None when there is no such file or no trace.

    `config` is the eval run's saved config; it says which trigger each value comes from. Raises DataError
    naming the file and line of a trace that lacks a field.
    """
    if not path.exists():
        return None
    found = _Collected()
    for where, line in iter_jsonl(path, takes_halves=True):
        try:
            found.add(line, _trigger(str(line["strategy"]), config))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{where} is not a trace ({reason}); rerun s2t eval.") from error
    return _traces(found) if found.problems else None


def script_json(data: Any) -> str:
    """JSON that is safe inside a <script> element: ASCII only, no `<`, `>` or `&`, no NaN."""
    text = _json(_finite(data))
    for char, escaped in _UNSAFE.items():
        text = text.replace(char, escaped)
    return text


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def unpack(block: str) -> Any:
    """The data of a block, as the page's script reads it."""
    return json.loads(zlib.decompress(base64.b64decode(block), wbits=-15))


def _traces(found: _Collected) -> Traces:
    names, strategies = list(found.problems), list(found.runs)
    problems = list(found.problems.values())
    index = {
        "blockSize": PROBLEMS_PER_BLOCK,
        "precision": PRECISION,
        "probabilityPrecision": PROBABILITY_PRECISION,
        "ids": names,
        "questions": [problem["question"] for problem in problems],
        "golds": [problem["gold"] for problem in problems],
        "strategies": strategies,
        "scores": [_columns([found.runs[s].get(name, (None,))[0] for name in names]) for s in strategies],
        "measures": {name: _measure(name, found.readings[name]) for name in _measures(found.readings)},
        "pair": [strategies.index(name) for name in _pair(strategies)],
    }
    texts = {"pieces": _json(found.pieces.rows())}
    for number, start in enumerate(range(0, len(names), PROBLEMS_PER_BLOCK)):
        part = slice(start, start + PROBLEMS_PER_BLOCK)
        texts[f"prompts-{number}"] = _json([problem["prompt"] for problem in problems[part]])
        for place, strategy in enumerate(strategies):
            runs = found.runs[strategy]
            texts[f"{place}-{number}"] = _array(runs[name][1] if name in runs else "null" for name in names[part])
    return Traces(index, {name: _pack(text) for name, text in texts.items()})


def _array(items: Iterable[str]) -> str:
    return "[" + ",".join(items) + "]"


def _pack(text: str) -> str:
    packer = zlib.compressobj(level=9, wbits=-15)
    return base64.b64encode(packer.compress(text.encode("ascii")) + packer.flush()).decode("ascii")


def _run(steps: Sequence[dict[str, Any]], trigger: str, pieces: _Pieces) -> dict[str, Any]:
    """t: token of every step; m: its readings by name; f, x, o: steps that triggered, that flipped, at which the LLM would
    have written another token; g: greedy tokens where they are others; c: candidates. g and c are keyed by step."""
    shown = {i: step for i, step in enumerate(steps) if step.get("fired") or step.get("candidates")}
    return {
        "t": [pieces.place(step["token_id"], step["text"]) for step in steps],
        "m": _readings(steps, trigger),
        "f": [i for i, step in shown.items() if step.get("fired")],
        "x": [i for i, step in enumerate(steps) if step.get("flip")],
        "o": [i for i, step in shown.items() if not step.get("fired") and "divergence" in step],
        "g": {i: place for i, step in enumerate(steps) if (place := _greedy(step, pieces)) is not None},
        "c": {i: _candidates(step["candidates"], pieces) for i, step in shown.items() if step.get("candidates")},
    }


def _greedy(step: dict[str, Any], pieces: _Pieces) -> int | None:
    is_other = "greedy_id" in step and (step.get("flip") or step["greedy_id"] != step["token_id"])
    return pieces.place(step["greedy_id"], step["greedy_text"]) if is_other else None


def _readings(steps: Sequence[dict[str, Any]], trigger: str) -> dict[str, list[int | None]]:
    """Trigger values under the trigger's name, divergences under theirs; a name without any value is left out."""
    columns = {"divergence": [step.get("divergence") for step in steps]}
    columns[trigger] = [step.get("value", step.get(trigger)) for step in steps]
    scaled = {name: [_scaled(value, PRECISION) for value in column] for name, column in columns.items()}
    return {name: column for name, column in scaled.items() if any(value is not None for value in column)}


def _candidates(candidates: Sequence[dict[str, Any]], pieces: _Pieces) -> list[Any]:
    """[places in the table, p_S, p_L, scores, which one was accepted]; a column that is not known is 0."""
    chosen = [place for place, candidate in enumerate(candidates) if candidate["selected"]]
    return [
        [pieces.place(candidate["id"], candidate["text"]) for candidate in candidates],
        _column([candidate["slm_prob"] for candidate in candidates], PROBABILITY_PRECISION),
        _column([candidate["llm_prob"] for candidate in candidates], PROBABILITY_PRECISION),
        _column([candidate["score"] for candidate in candidates], PRECISION),
        chosen[0] if chosen else -1,
    ]


def _column(values: Sequence[float | None], precision: int) -> list[int | None] | int:
    scaled = [_scaled(value, precision) for value in values]
    return scaled if any(value is not None for value in scaled) else 0


def _scores(line: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    extracted = line["extracted"]
    return {
        "correct": int(bool(line["is_correct"])),
        "answer": None if extracted is None else str(extracted),
        "tokens": len(run["t"]),
        "fired": len(run["f"]),
        "flips": len(run["x"]),
    }


def _columns(rows: Sequence[dict[str, Any] | None]) -> dict[str, list[Any]]:
    keys = ("correct", "answer", "tokens", "fired", "flips")
    return {key: [None if row is None else row[key] for row in rows] for key in keys}


def _trigger(strategy: str, config: dict[str, Any]) -> str:
    """What the values of a strategy are readings of: the trigger behind its `@`, else the run's."""
    base, _, own = strategy.partition("@")
    trigger = own or str(config.get("trigger", "auto"))
    return _AUTO.get(base, "trigger value") if trigger == "auto" else trigger


def _measures(readings: dict[str, Counter[int]]) -> list[str]:
    return sorted(readings, key=lambda name: (_IN_ORDER.index(name) if name in _IN_ORDER else len(_IN_ORDER), name))


def _measure(name: str, readings: Counter[int]) -> dict[str, Any]:
    """Unit of a reading and the value that gets the full colour: 1, or the 99th percentile of what has no bound."""
    if name in ("criticality", "random"):
        return {"unit": "", "top": 1.0}
    left = 0.99 * readings.total()
    for value in sorted(readings):
        left -= readings[value]
        if left <= 0:
            return {"unit": UNITS.get(name, ""), "top": max(value, 1) / PRECISION}
    return {"unit": UNITS.get(name, ""), "top": 1.0}


def _pair(strategies: Sequence[str]) -> tuple[str, str]:
    """The two strategies shown first."""
    left = "greedy" if "greedy" in strategies else strategies[0]
    for name in ("s2t-local", "s2t", "takeover", *strategies):
        if name in strategies and name != left:
            return left, name
    return left, left


def _scaled(value: float | None, precision: int) -> int | None:
    """A whole number of 1/precision; None for what is not a finite number."""
    return round(value * precision) if value is not None and math.isfinite(value) else None


def _finite(data: Any) -> Any:
    """A copy with non-finite numbers as None; JSON has none, and browsers refuse NaN."""
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
