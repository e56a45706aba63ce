"""What docs/rivals.md says was found, from finished studies: `python docs/make_rivals.py embedded=RUN [real=RUN]`.

Writes docs/results/rivals.json, docs/images/rivals.png (of the embedded pair; rivals-real.png of the real one), and whatever
stands between `<!-- NAME -->` and `<!-- / -->` in docs/rivals.md. A study that is not given stays as it was.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from s2t.files import load_run, read_json, write_bytes, write_json, write_text
from s2t.report.chart import draw_charts
from s2t.studies.run import cell

DOCS = Path(__file__).parent
RESULTS, PAGE = DOCS / "results" / "rivals.json", DOCS / "rivals.md"
PICTURES = {"embedded": "rivals.png", "real": "rivals-real.png"}
SHOWN = (
    *(
        "method",
        "asked for %",
        "LLM's tokens %",
        "accuracy %",
        "95 %",
        "over ours, points %",
        "95 % of that",
        "p (Holm) of ours",
    ),
    *("SLM GFLOPs", "LLM GFLOPs", "tokens per LLM forward", "seconds"),
)
_MARK = re.compile(r"<!-- ([^/\n]+?) -->.*?<!-- / -->", re.DOTALL)
_SURE, _TAKEN = 0.05, "LLM's tokens %"


def summary(run: Path) -> dict[str, Any]:
    """The rows of a study by column, with what it was run on."""
    config, study = load_run(run, "study")["config"], read_json(run / "study.json")
    names = ("slm", "llm", "task", "limit", "calibration_limit", "num_seeds", "shares")
    about = {name: Path(config[name]).name if name in ("slm", "llm") else config[name] for name in names}
    rows = [dict(zip(study["columns"], row, strict=True)) for row in study["rows"]]
    return about | {"rows": rows, "notes": study["notes"]}


def page(text: str, results: dict[str, Any]) -> str:
    """The page with every marked place filled from the results."""
    return _MARK.sub(lambda found: f"<!-- {found[1]} -->{_filled(found[1], results)}<!-- / -->", text)


def _filled(name: str, results: dict[str, Any]) -> str:
    kind, _, pair = name.partition(":")
    if kind == "wins":
        return f"\n{wins(results[pair])}\n" if pair in results else "\nThis study has not been run to its end yet.\n"
    if kind == "table":
        picture = f"![Accuracy against FLOPs and against tokens of the LLM](images/{PICTURES[pair]})"
        return f"\n\n{picture}\n{table(results[pair])}\n" if pair in results else ""
    return f" {found(name, results['embedded'])} " if "embedded" in results else ""


def table(result: dict[str, Any]) -> str:
    """All rows as Markdown, with the notes below."""
    lines = [[cell(column, row[column]) for column in SHOWN] for row in result["rows"]]
    rows = [f"| {' | '.join(cells)} |" for cells in (SHOWN, ["---"] * len(SHOWN), *lines)]
    return "\n".join(["", *rows, "", *(f"- {note}" for note in result["notes"])])


def wins(result: dict[str, Any]) -> str:
    """Which rivals are ahead of ours, and which behind, where chance does not explain it."""
    told = {ahead: [_against(row) for row in result["rows"] if _verdict(row) == ahead] for ahead in (1, -1)}
    lines = [
        "",
        f"- **Ahead of ours: {'; '.join(told[1]) or 'none'}.**",
        f"- Behind ours: {'; '.join(told[-1]) or 'none'}.",
    ]
    return "\n".join(lines)


def found(method: str, result: dict[str, Any]) -> str:
    """What the study found of a method: where it is ahead first, then its accuracy at every share or setting."""
    rows = [row for row in result["rows"] if row["method"].partition(",")[0] == method]
    ahead = [_against(row) for row in rows if _verdict(row) == 1]
    headline = f"**It wins here: {'; '.join(ahead)}.** " if ahead else ""
    return f"{headline}*Found:* {'; '.join(map(_accuracy, rows))}."


def _verdict(row: dict[str, Any]) -> int:
    """1 ahead of ours, -1 behind, 0 where chance may have done it or nothing was compared."""
    if row["over ours, points %"] is None or row["p (Holm) of ours"] >= _SURE:
        return 0
    return 1 if row["over ours, points %"] > 0 else -1


def _against(row: dict[str, Any]) -> str:
    difference, interval = cell("%", row["over ours, points %"]), cell("95 %", row["95 % of that"])
    return f"`{row['method']}`{_asked(row)} by {difference} points ({interval}) over `{row['compared with']}`"


def _accuracy(row: dict[str, Any]) -> str:
    setting = row["method"].partition(", ")[2]
    told = f"{cell('%', row['accuracy %'])} % ({cell('95 %', row['95 %'])})"
    taken = f", the LLM's tokens {cell('%', row[_TAKEN])} %" if row["asked for %"] is not None else ""
    return f"{told}{_asked(row)}{taken}{f' with {setting}' if setting else ''}"


def _asked(row: dict[str, Any]) -> str:
    return "" if row["asked for %"] is None else f" at {100 * row['asked for %']:g} %"


def main(arguments: list[str]) -> None:
    results = read_json(RESULTS) if RESULTS.exists() else {}
    for argument in arguments:
        pair, _, run = argument.partition("=")
        results[pair] = summary(Path(run))
        write_bytes(DOCS / "images" / PICTURES[pair], draw_charts(read_json(Path(run) / "study.json")["chart"]))
    write_json(RESULTS, results)
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), results))


if __name__ == "__main__":
    main(sys.argv[1:])
