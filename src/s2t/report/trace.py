"""Token traces for the page: traces.jsonl regrouped by problem, made compact, written as safe inline JSON.

Model text is untrusted. It reaches the page only as data in a JSON script element, in which no character
can end the element, and the page's script writes it with textContent alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from s2t.errors import DataError
from s2t.files import read_jsonl

_UNITS = {"divergence": "nats", "entropy": "nats", "criticality": "0 to 1", "random": "0 to 1"}
_AUTO = {"takeover": "divergence", "s2t": "divergence", "s2t-local": "criticality"}
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}  # U+2028 and U+2029: json escapes all non-ASCII


def load_traces(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Read traces.jsonl into what the page's script expects; None when there is no such file or no trace.

    `config` is the eval run's saved config; it says which trigger each value comes from. Raises DataError
    naming the file and line of a trace that lacks a field.
    """
    if not path.exists():
        return None
    problems: dict[str, dict[str, Any]] = {}
    values: dict[str, list[float]] = {}
    for number, line in enumerate(read_jsonl(path), start=1):
        try:
            problem, run = _problem(line), _run(line)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}:{number} is not a trace ({type(error).__name__}: {error}); rerun s2t eval."
            ) from error
        strategy = str(line["strategy"])
        problems.setdefault(problem["id"], problem)["runs"][strategy] = run
        values.setdefault(strategy, []).extend(step[4] for step in run["steps"] if step[4] is not None)
    if not problems:
        return None
    scales = {name: _scale(name, read, config) for name, read in values.items()}
    return {
        "problems": _interesting_first(list(problems.values())),
        "scales": scales,
        "pair": _pair(list(values)),
    }


def script_json(data: Any) -> str:
    """JSON that is safe inside a <script> element: ASCII only, no `<`, `>` or `&`, no NaN."""
    text = json.dumps(_finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char, escaped in _UNSAFE.items():
        text = text.replace(char, escaped)
    return text


def _problem(line: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": str(line["problem_id"]),
        "question": str(line["question"]),
        "gold": str(line["gold"]),
        "prompt": str(line["prompt_text"]),
        "runs": {},
    }


def _run(line: dict[str, Any]) -> dict[str, Any]:
    steps = [_step(step) for step in line["steps"]]
    return {"correct": bool(line["is_correct"]), "extracted": line["extracted"], "steps": steps}


def _step(step: dict[str, Any]) -> list[Any]:
    """[token_id, text, greedy_text, fired, value, flip, candidates]; an array, because traces are long."""
    candidates = step["candidates"]
    return [
        step["token_id"],
        str(step["text"]),
        str(step["greedy_text"]),
        int(bool(step["fired"])),
        _short(step["value"]),
        int(bool(step["flip"])),
        None if candidates is None else [_candidate(candidate) for candidate in candidates],
    ]


def _candidate(candidate: dict[str, Any]) -> list[Any]:
    """[text, p_S, p_L, score, selected]."""
    numbers = [_short(candidate[key]) for key in ("slm_prob", "llm_prob", "score")]
    return [str(candidate["text"]), *numbers, int(bool(candidate["selected"]))]


def _scale(strategy: str, values: list[float], config: dict[str, Any]) -> dict[str, Any]:
    """What a strategy's trigger values mean and which value gets the full colour."""
    trigger = str(config.get("trigger", "auto"))
    name = _AUTO.get(strategy, "") if trigger == "auto" else trigger
    if name in ("criticality", "random"):
        top = 1.0
    else:
        ordered = sorted(values)
        top = ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0
    return {"name": name or "trigger value", "unit": _UNITS.get(name, ""), "top": top, "any": bool(values)}


def _pair(strategies: list[str]) -> list[str]:
    """The two strategies shown first."""
    left = "greedy" if "greedy" in strategies else strategies[0]
    for name in ("s2t-local", "s2t", "takeover", *strategies):
        if name in strategies and name != left:
            return [left, name]
    return [left, left]


def _interesting_first(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Problems on which the strategies disagree come first; the order is otherwise kept."""
    return sorted(problems, key=lambda problem: len({run["correct"] for run in problem["runs"].values()}) < 2)


def _short(value: float | None) -> float | None:
    """Four significant digits, and None for what is not a finite number."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def _finite(data: Any) -> Any:
    """A copy with non-finite numbers as None; JSON has none, and browsers refuse NaN."""
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
