"""A study of the tokens at which an SLM is about to slip: does criticality fire there, and does selection write the right one.

In a written result every token that may stand is known: the value of the left side says it. So the true slips of an SLM that
was made to slip are known without any model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from s2t.core.stats import clustered_rate_interval
from s2t.files import iter_jsonl, read_json
from s2t.studies.knowledge import written_sums
from s2t.studies.lab import Chart, Findings, Lab, Series

_DIGITS = re.compile(r"-?\d*(?:\.\d+)?")
_STRATEGIES = ("s2t-local", "s2t")


@dataclass(frozen=True, slots=True)
class SlipStep:
    """One step of an answer: what the SLM would have written and what was, where a result of a sum is written."""

    is_result: bool
    greedy_is_right: bool
    is_right: bool
    fired: bool
    flip: bool


def slips(lab: Lab) -> Findings:
    """Precision and recall of the trigger and of selection on the true slips, on templates seen in training and held out."""
    adapter, calibration = str(lab.trained()), str(lab.calibrated())
    lab.evaluated("eval", ",".join(_STRATEGIES), adapter=adapter, calibration=calibration, num_traces=lab.config.limit)
    templates = {row["problem_id"]: row["template"] for _, row in iter_jsonl(lab.folder / "eval" / "results.jsonl")}
    held = set(read_json(Path(adapter) / "s2t_config.json")["heldout_templates"])
    found = _choices(lab.folder / "eval" / "traces.jsonl")
    rows: list[tuple[Any, ...]] = []
    bars: list[Series] = []
    for name in _STRATEGIES:
        for part, wanted in (("all", None), ("seen in training", False), ("held out", True)):
            owned = [
                (problem, choice)
                for problem, choices in found[name].items()
                if wanted is None or (templates[problem] in held) == wanted
                for choice in choices
            ]
            if owned:
                row, series = _row(name, part, owned)
                rows.append(row)
                bars += series if wanted is not None else []
    columns = (
        *("strategy", "templates", "slips ahead", "trigger: recall %", "95 % of it", "trigger: precision %"),
        *("selection: right at slips %", "95 % of that", "right where fired %", "flips that mend a slip %"),
        "right tokens spoiled %",
    )
    notes = [
        "A slip ahead: a step, inside a written result, whose greedy token is not the one that the value of the left side "
        "asks for. Recall: slips at which the trigger fires; precision: fired steps that are slips (a step can be a divergence "
        "point without being one). Spoiled: result tokens that the SLM had right and selection wrote wrong. Intervals "
        "resample problems.",
    ]
    return Findings(
        "The trigger and selection at true slips", columns, rows, Chart("", "share (%)", bars, "bar"), notes
    )


def choices_of(steps: Sequence[Mapping[str, Any]]) -> list[SlipStep]:
    """What every step of a traced answer chose; the first number of a pair of equal signs is judged once."""
    texts = [str(step["text"]) for step in steps]
    starts = [0, *accumulate(map(len, texts))]
    verdicts = {place: (greedy, own) for place, greedy, own in _judged(steps, texts, starts)}
    return [
        SlipStep(
            place in verdicts,
            *verdicts.get(place, (True, True)),
            bool(step.get("fired")),
            bool(step.get("flip")),
        )
        for place, step in enumerate(steps)
    ]


def _judged(
    steps: Sequence[Mapping[str, Any]], texts: Sequence[str], starts: Sequence[int]
) -> Iterator[tuple[int, bool, bool]]:
    """(step, whether the SLM's token is right, whether the written one is) for the tokens of every result.

    A result is followed up to its first wrong token: behind it nothing is asked for.
    """
    whole = "".join(texts)
    for found, digits in written_sums(whole):
        if "," in found[3]:
            continue
        wanted, position = digits, found.start(3)
        place = int(np.searchsorted(starts, position, side="right")) - 1
        while place < len(steps):
            before = position - starts[place]
            own, greedy = texts[place], str(steps[place].get("greedy_text", texts[place]))
            is_right = fits(own[before:], wanted)
            yield place, greedy[:before] == own[:before] and fits(greedy[before:], wanted), is_right
            written = _DIGITS.match(own, before)
            length = len(written[0]) if written else 0
            if not is_right or length < len(own) - before:
                break
            wanted, position, place = wanted[length:], starts[place + 1], place + 1


def fits(text: str, wanted: str) -> bool:
    """Whether a token may stand where the digits `wanted` are still to be written (none: the number is over)."""
    found = _DIGITS.match(text)
    digits = found[0] if found else ""
    if not wanted:
        return not text[:1].isdigit()
    return bool(digits) and wanted.startswith(digits) and (len(digits) == len(text) or digits == wanted)


def _choices(path: Path) -> dict[str, dict[str, list[SlipStep]]]:
    found: dict[str, dict[str, list[SlipStep]]] = {name: {} for name in _STRATEGIES}
    for _, trace in iter_jsonl(path):
        found[trace["strategy"]][trace["problem_id"]] = choices_of(trace["steps"])
    return found


def _row(name: str, part: str, owned: Sequence[tuple[str, SlipStep]]) -> tuple[tuple[Any, ...], list[Series]]:
    owners = np.asarray([owner for owner, _ in owned])
    marks = {key: np.asarray([getattr(c, key) for _, c in owned]) for key in SlipStep.__dataclass_fields__}
    slip = marks["is_result"] & ~marks["greedy_is_right"]
    fine = marks["is_result"] & marks["greedy_is_right"]
    recall, mended = marks["fired"][slip], marks["is_right"][slip]
    intervals = [clustered_rate_interval(hits, owners[slip]) if slip.any() else None for hits in (recall, mended)]
    shares = {
        "recall": _share(recall),
        "precision": _share(slip[marks["fired"]]),
        "mended": _share(mended),
        "where fired": _share(marks["is_right"][slip & marks["fired"]]),
        "flips": _share((slip & marks["is_right"])[marks["flip"]]),
        "spoiled": _share(~marks["is_right"][fine]),
    }
    row = (
        *(name, part, int(slip.sum()), shares["recall"], intervals[0], shares["precision"]),
        *(shares["mended"], intervals[1], shares["where fired"], shares["flips"], shares["spoiled"]),
    )
    labels = (("trigger fires", "recall", intervals[0]), ("right token written", "mended", intervals[1]))
    series = [
        Series(f"{name}, {part}: {text}", [0.0], [shares[key] or 0.0], [interval]) for text, key, interval in labels
    ]
    return row, series


def _share(marks: np.ndarray) -> float | None:
    return float(marks.mean()) if marks.size else None
