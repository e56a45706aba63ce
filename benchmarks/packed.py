"""Does packing cost accuracy? Evaluations of one model at several precisions, compared problem by problem.

    python benchmarks/packed.py bfloat16=runs/eval-bf16 Q8_0=runs/eval-q8_0 Q4_K_M=runs/eval-q4_k_m

Every folder is one of `s2t eval` on the same problems; the first is what the others are compared with. Writes
docs/results/packed.json and prints a table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from s2t.core.stats import bootstrap_interval, paired_comparison
from s2t.files import read_json, read_jsonl, write_json

OUT = Path(__file__).parents[1] / "docs" / "results" / "packed.json"


def main() -> None:
    folders = {name: Path(folder) for name, _, folder in (word.partition("=") for word in sys.argv[1:])}
    base, *_ = folders
    rows = {name: by_strategy(folder) for name, folder in folders.items()}
    document: dict[str, Any] = {"task": read_json(folders[base] / "summary.json")["task"], "compared_with": base}
    document["precisions"] = {
        name: {strategy: one(found, rows[base][strategy]) for strategy, found in strategies.items()}
        for name, strategies in rows.items()
    }
    write_json(OUT, document)
    print(table(document))


def by_strategy(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(folder / "results.jsonl"):
        found.setdefault(row["strategy"], []).append(row)
    return found


def one(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy, triggers and flips of a strategy, and the paired difference from the base precision."""
    assert [row["problem_id"] for row in rows] == [row["problem_id"] for row in base], "the problems differ"
    correct, tokens = [row["is_correct"] for row in rows], sum(row["cost"]["generated"] for row in rows)
    test = paired_comparison(correct, [row["is_correct"] for row in base])
    return {
        "num_problems": len(rows),
        "accuracy": sum(correct) / len(rows),
        "ci95": bootstrap_interval(correct),
        "trigger_rate": sum(row["num_triggered"] for row in rows) / tokens,
        "flip_rate": sum(row["num_flips"] for row in rows) / tokens,
        "difference": test["difference"],
        "difference_ci95": test["ci95"],
        "p_value": test["p_value"],
    }


def table(document: dict[str, Any]) -> str:
    lines = [
        f"| | strategy | accuracy % | 95 % | over {document['compared_with']}, points (95 %) | p |",
        "|" + " --- |" * 6,
    ]
    for precision, strategies in document["precisions"].items():
        for strategy, found in strategies.items():
            low, high = (f"{100 * value:.1f}" for value in found["ci95"])
            left, right = (f"{100 * value:.1f}" for value in found["difference_ci95"])
            gain = f"{100 * found['difference']:+.1f} ({left} to {right})"
            cells = (
                precision,
                strategy,
                f"{100 * found['accuracy']:.1f}",
                f"{low} to {high}",
                gain,
                f"{found['p_value']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
