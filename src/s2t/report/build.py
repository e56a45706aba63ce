"""Builds report.html and its pictures from an eval run folder and, optionally, a measure run folder.

Numbers become text here, so the template only lays them out. Everything the page needs is inside it: no network,
autoescape for whatever came from a model or a file, and a policy under which only the page's own script and style,
known by their hashes, do anything.
"""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from s2t.config import NEEDS_LLM
from s2t.errors import DataError, missing_extra
from s2t.files import load_run, read_json, write_bytes, write_text
from s2t.report import plots
from s2t.report.figure import DARK, LIGHT
from s2t.report.lead import repaired, sentences
from s2t.report.trace import Traces, load_traces, script_json
from s2t.web import source

PICTURES = ("accuracy_cost", "hit_at_k", "rank_ring", "hit_by_divergence")
_AT_THE_TOP = PICTURES[:2]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture in both appearances, with its title, a caption, and a description for who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes


def write_report(
    run: str | Path, out: str | Path | None = None, measure: str | Path | None = None, note: str | None = None
) -> Path:
    """Write report.html and plots/*.png of an eval run into `out` (default: the run); return the page's path.

    `measure` is a measure run folder (hit-rate curves; without it the summary's `sufficiency` is used).
    `note` says in plain words how the SLM was made. Raises DataError for a run that is missing,
    unfinished or malformed, and MissingExtraError without matplotlib or jinja2.
    """
    run = Path(run)
    folder = Path(out) if out is not None else run
    manifest = load_run(run, "eval")
    summary = _read_object(run / "summary.json", "run s2t eval to the end first")
    measured = None
    if measure is not None:
        load_run(Path(measure), "measure")
        measured = _read_object(Path(measure) / "measure.json", "run s2t measure to the end first")
    traces = load_traces(run / "traces.jsonl", manifest.get("config") or {})
    try:
        pictures = draw(summary, measured)
        page = _render(page_context(summary, measured, manifest, note), pictures, traces)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"the summary of {run} (or its measure.json) lacks or mistypes a value "
            f"({type(error).__name__}: {error}); rerun s2t eval with this version."
        ) from error
    return _write(folder, page, pictures)


def draw(summary: dict[str, Any], measured: dict[str, Any] | None) -> list[Picture]:
    """All pictures the data allows, in page order."""
    pictures = [_cost_picture(summary["strategies"])]
    if curve := measured or summary.get("sufficiency"):
        pictures.append(_hit_picture(curve))
        if shares := plots.rank_shares(curve["hit_rate"]):
            pictures.append(_ring_picture(shares, curve))
    if measured and measured.get("hit_rate_by_divergence"):
        pictures.append(_bins_picture(measured["hit_rate_by_divergence"]))
    return pictures


def page_context(
    summary: dict[str, Any], measured: dict[str, Any] | None, manifest: dict[str, Any], note: str | None
) -> dict[str, Any]:
    """Everything the template prints, as text."""
    return {
        "task": str(summary["task"]),
        "sentences": sentences(summary, measured),
        "note": [part.strip() for part in (note or "").split("\n\n") if part.strip()],
        "facts": _facts(summary, measured),
        "rows": [_strategy_row(name, scores) for name, scores in summary["strategies"].items()],
        "paired": [_paired_row(name, test) for name, test in (summary.get("paired") or {}).items()],
        "templates": _templates(summary),
        "gap": _gap(summary.get("gap_closed")),
        "versions": ", ".join(f"{name} {value}" for name, value in (manifest.get("versions") or {}).items() if value),
    }


def _read_object(path: Path, next_step: str) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path} is missing; {next_step}.")
    data = read_json(path, takes_halves=True)
    if not isinstance(data, dict):
        raise DataError(f"{path} must hold one JSON object; got {type(data).__name__}; {next_step}.")
    return data


def _render(context: dict[str, Any], pictures: list[Picture], traces: Traces | None) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise missing_extra("jinja2", "plots") from error

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = source("tokens.css") + _source("report.css")
    script = source("tokens.js") + _source("report.js") if traces is not None else ""
    page = environment.from_string(_source("report.html")).render(
        **context,
        first_pictures=[_embedded(picture) for picture in pictures if picture.name in _AT_THE_TOP],
        pictures=[_embedded(picture) for picture in pictures if picture.name not in _AT_THE_TOP],
        example=repaired(traces),
        policy=content_policy(style, script),
        style=Markup(style),  # ours, not escaped: its hash must hold
        script=Markup(script),
        trace_index=None if traces is None else Markup(script_json(traces.index)),  # escaped by script_json
        blocks={} if traces is None else traces.blocks,
        num_traced=0 if traces is None else len(traces.index["ids"]),
    )
    return page.encode("utf-8", "replace").decode()  # a lone surrogate in a file name or a note has no UTF-8


def content_policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy: nothing but this very style and script, and pictures inside the page."""
    scripts = _hash(script) if script else "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _source(name: str) -> str:
    return resources.files("s2t.report").joinpath(name).read_text(encoding="utf-8")


def _embedded(picture: Picture) -> dict[str, str]:
    texts = {"title": picture.title, "caption": picture.caption, "alt": picture.alt}
    return texts | {"light": _data_uri(picture.light), "dark": _data_uri(picture.dark)}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _write(folder: Path, page: str, pictures: list[Picture]) -> Path:
    """Write pictures, then the page; a picture of an earlier report that this one lacks is removed."""
    plots_folder = folder / "plots"
    try:
        for name in set(PICTURES) - {picture.name for picture in pictures}:
            (plots_folder / f"{name}.png").unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{plots_folder} cannot be written: {error.strerror}; choose another --out.") from error
    for picture in pictures:
        write_bytes(plots_folder / f"{picture.name}.png", picture.light)
    path = folder / "report.html"
    write_text(path, page)
    return path


def _ring_picture(shares: tuple[float, float, float], curve: dict[str, Any]) -> Picture:
    said = ", ".join(f"{_percent(share)} at {label}" for share, label in zip(shares, plots.RANKS, strict=True))
    points = curve.get("num_divergence_points")
    return Picture(
        "rank_ring",
        "Where the LLM's token stands",
        "Rank of the LLM's likeliest token in the SLM's order, at divergence points alone. Both blue parts together are hit@8.",
        f"The LLM's token: {said}.",
        plots.rank_ring(shares, points, LIGHT),
        plots.rank_ring(shares, points, DARK),
    )


def _hit_picture(curve: dict[str, Any]) -> Picture:
    rates, ci95 = curve["hit_rate"], curve.get("hit_rate_ci95")
    points = curve.get("num_divergence_points")
    said = ", ".join(f"{_percent(rate)} at K = {k}" for k, rate in rates.items())
    return Picture(
        "hit_at_k",
        "Local sufficiency",
        f"Share of the {_count(points)} divergence points at which the LLM's token is among the SLM's first K"
        + (", with 95 % intervals." if ci95 else "."),
        f"Hit rate: {said}.",
        plots.hit_at_k(rates, ci95, LIGHT),
        plots.hit_at_k(rates, ci95, DARK),
    )


def _bins_picture(bins: list[dict[str, Any]]) -> Picture:
    last = bins[-1]["hit_rate"]
    said = ", ".join(f"hit@{k} {_percent(last.get(k))}" for k in plots.HIT_BY_DIVERGENCE_KS)
    return Picture(
        "hit_by_divergence",
        "Hit rate by divergence",
        "All measured steps past the warm-up, grouped by how far the two models' next-token distributions are apart.",
        f"In the highest of {len(bins)} divergence bins: {said}.",
        plots.hit_by_divergence(bins, LIGHT),
        plots.hit_by_divergence(bins, DARK),
    )


def _cost_picture(strategies: dict[str, dict[str, Any]]) -> Picture:
    said = ", ".join(f"{name} {_percent(scores['accuracy'])}" for name, scores in strategies.items())
    return Picture(
        "accuracy_cost",
        "Accuracy against cost",
        "Cost counts every token run through either model: prompts, generated tokens and candidates.",
        f"Accuracy: {said}.",
        plots.accuracy_cost(strategies, LIGHT),
        plots.accuracy_cost(strategies, DARK),
    )


def _facts(summary: dict[str, Any], measured: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Names, values, and what stands below a value."""
    pair = summary["pair"]
    facts = [
        ("SLM", str(pair["slm"]), _size(pair.get("slm_params"))),
        ("LLM", str(pair.get("llm") or "none"), _size(pair.get("llm_params"))),
        ("Test problems", _count(summary["num_test"]), ""),
        ("Seed", str(summary["seed"]), ""),
    ]
    if curve := measured or summary.get("sufficiency"):
        rates = curve["hit_rate"]
        facts.append(("hit@1, hit@8", f"{_percent(rates.get('1'))}, {_percent(rates.get('8'))}", ""))
        facts.append(("Divergence points", f"{_percent(curve.get('trigger_rate'))} of steps", ""))
    return facts


def _strategy_row(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    needs_llm = name.partition("@")[0] in NEEDS_LLM or bool(scores["llm_forwards"])
    counts = ("slm_tokens", "llm_tokens", "slm_forwards", "llm_forwards")
    return {
        "name": name,
        **_accuracy(scores),
        "n": _count(scores["num_problems"]),
        "pass_at_n": _pass_at_n(scores),
        "trigger": _percent(scores.get("trigger_rate")),
        "flip": _percent(scores.get("flip_rate")),
        "seconds": _seconds(scores.get("seconds")),
        "llm_needed": "yes" if needs_llm else "no",
        **{key: _count(scores.get(key)) for key in counts},
    }


def _accuracy(scores: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and its interval as text, and in percent for the small interval drawing."""
    value = 100 * scores["accuracy"]
    low, high = (100 * end for end in scores.get("ci95") or (scores["accuracy"], scores["accuracy"]))
    interval = f"{low:.1f} to {high:.1f}" if scores.get("ci95") else ""
    bar = {"left": f"{low:.2f}", "width": f"{max(high - low, 0):.2f}", "at": f"{value:.2f}"}
    return {"accuracy": f"{value:.1f}", "interval": interval, "bar": bar}


def _pass_at_n(scores: dict[str, Any]) -> str:
    if scores.get("pass_at_n") is None:
        return ""
    return f"pass@{scores.get('num_samples', 'N')}: {_percent(scores['pass_at_n'])}"


def _paired_row(name: str, test: dict[str, Any]) -> dict[str, str]:
    low, high = test.get("ci95") or (None, None)
    return {
        "name": name,
        "difference": _points(test["difference"]),
        "interval": f"{_points(low)} to {_points(high)}",
        "p": _p_value(test.get("p_value")),
        "p_holm": _p_value(test.get("p_holm")),
        "wins": _count(test.get("wins")),
        "losses": _count(test.get("losses")),
    }


def _templates(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Seen and unseen templates side by side; None when the task has no templates."""
    parts = [summary.get("seen_templates"), summary.get("unseen_templates")]
    if not any(parts):
        return None
    names = [name for name in summary["strategies"] if any(part and name in part["strategies"] for part in parts)]
    pairs = [name for name in summary.get("paired") or {} if any(name in _paired(part) for part in parts)]
    return {
        "counts": [_count(part["num_problems"] if part else 0) for part in parts],
        "rows": [(name, [_part_accuracy(part, name) for part in parts]) for name in names],
        "paired": [(name, [_part_paired(part, name) for part in parts]) for name in pairs],
    }


def _part_accuracy(part: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    return _accuracy(part["strategies"][name]) if part and name in part["strategies"] else None


def _part_paired(part: dict[str, Any] | None, name: str) -> dict[str, str] | None:
    return _paired_row(name, _paired(part)[name]) if name in _paired(part) else None


def _paired(part: dict[str, Any] | None) -> dict[str, Any]:
    return (part or {}).get("paired") or {}


def _gap(share: float | None) -> str | None:
    if share is None or not math.isfinite(share):
        return None
    return _percent(share, 0)


def _size(params: float | None) -> str:
    return f"{_compact(params)} parameters" if params else ""


def _compact(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}\N{NO-BREAK SPACE}{suffix}"
    return f"{value:g}"


def _count(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    return f"{value:.1f}" if value is not None and math.isfinite(value) and value < 100 else _count(value)


def _percent(rate: float | None, digits: int = 1) -> str:
    return "–" if rate is None or not math.isfinite(rate) else f"{100 * rate:.{digits}f} %"


def _points(rate: float | None) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    if rate is None or not math.isfinite(rate):
        return "–"
    text = f"{100 * rate:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _p_value(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
