"""Does packing cost accuracy? Evaluations of one model at several precisions, compared problem by problem.

    python benchmarks/packed.py bfloat16=runs/eval-bf16 Q8_0=runs/eval-q8_0 Q4_K_M=runs/eval-q4_k_m [--out FILE]

Every folder is one of `s2t eval`, or several joined by commas where strategies were run apart; the first is what the others are
compared with. Problems and strategies are those that all have. Writes the file and prints a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2t.core.stats import bootstrap_interval, paired_comparison
from s2t.files import read_json, read_jsonl, write_json

OUT = Path(__file__).parents[1] / "docs" / "results" / "packed.json"

Rows = dict[str, dict[str, Any]]
"""Results by problem."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER[,FOLDER]")
    parser.add_argument("--out", type=Path, default=OUT)
    config = parser.parse_args()
    folders = {name: folder.split(",") for name, _, folder in (word.partition("=") for word in config.runs)}
    base, *_ = folders
    rows = {name: by_strategy([Path(folder) for folder in found]) for name, found in folders.items()}
    every = [found for strategies in rows.values() for found in strategies.values()]
    shared = [name for name in every[0] if all(name in found for found in every)]
    strategies = [strategy for strategy in rows[base] if all(strategy in found for found in rows.values())]
    document: dict[str, Any] = {
        "task": read_json(Path(folders[base][0]) / "summary.json")["task"],
        "compared_with": base,
        "precisions": {
            name: {strategy: one(found[strategy], rows[base][strategy], shared) for strategy in strategies}
            for name, found in rows.items()
        },
        "s2t-local over greedy": {
            name: paired_comparison(verdicts(found["s2t-local"], shared), verdicts(found["greedy"], shared))
            for name, found in rows.items()
        },
    }
    write_json(config.out, document)
    print(table(document))


def by_strategy(folders: Sequence[Path]) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in (row for folder in folders for row in read_jsonl(folder / "results.jsonl")):
        found.setdefault(row["strategy"], {})[row["problem_id"]] = row
    return found


def verdicts(rows: Rows, shared: Sequence[str]) -> list[bool]:
    return [rows[name]["is_correct"] for name in shared]


def one(rows: Rows, base: Rows, shared: Sequence[str]) -> dict[str, Any]:
    """Accuracy, triggers and flips of a strategy on some problems, and the paired difference from the base precision."""
    correct, own = verdicts(rows, shared), [rows[name] for name in shared]
    tokens = sum(row["cost"]["generated"] for row in own)
    test = paired_comparison(correct, verdicts(base, shared))
    return {
        "num_problems": len(own),
        "accuracy": sum(correct) / len(own),
        "ci95": bootstrap_interval(correct),
        "trigger_rate": sum(row["num_triggered"] for row in own) / tokens,
        "flip_rate": sum(row["num_flips"] for row in own) / tokens,
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
