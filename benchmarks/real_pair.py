"""The table of the real pair: every arm of `s2t reproduce recipes/qwen2.5-coder.toml`, from its run folders to one file.

    python benchmarks/real_pair.py runs/qwen2.5-coder      # -> docs/results/real-pair.json, docs/images/real_pair.png

Beside them docs/results/real-pair-questions.csv, which arm is right at which question (1, 0, or empty where it was not
asked), and real-pair-summaries.json, the summary of every run. An arm that was run alone
(`s2t eval --out runs/qwen2.5-coder/ARM`) is read from the folder of its name. Arms and tasks whose folders are not there, or
not finished, are named and left out. Accuracies have Wilson's 95 % intervals; two arms are compared on the problems that both
have. s2t's point in the picture is real-pair-earlier.json's, which drafted, unless the run itself did.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from s2t.core.stats import paired_comparison, wilson_interval
from s2t.files import read_json, read_jsonl, write_bytes, write_json, write_text
from s2t.report.chart import draw_charts

DOCS = Path(__file__).parents[1] / "docs"
WEIGHTS = "bfloat16, dequantised from Q4_K_M GGUF files"
ARMS = {
    "greedy": ("gsm8k", "greedy"),
    "self-consistency": ("gsm8k-votes", "self-consistency"),
    "llm": ("gsm8k-llm", "llm"),
    "takeover": ("gsm8k-with-llm", "takeover"),
    "s2t": ("gsm8k-with-llm", "s2t"),
    "s2t-local": ("gsm8k", "s2t-local"),
    "s2t-local@entropy": ("gsm8k", "s2t-local@entropy"),
    "s2t-local-stream": ("gsm8k-stream", "s2t-local"),
    "s2t-local-paper": ("gsm8k-paper", "s2t-local"),
    "s2t-local-paper@weight-0": ("gsm8k-paper-weight-0", "s2t-local"),
    "sft": ("gsm8k-sft", "greedy"),
    "kd": ("gsm8k-kd", "greedy"),
    "s2t-local-on-sft": ("gsm8k-on-sft", "s2t-local"),
    "svamp greedy": ("svamp", "greedy"),
    "svamp s2t-local": ("svamp", "s2t-local"),
    "svamp sft": ("svamp-sft", "greedy"),
    "humaneval greedy": ("humaneval", "greedy"),
    "humaneval s2t-local": ("humaneval", "s2t-local"),
    "humaneval sft": ("humaneval-sft", "greedy"),
}
TRAINED = ("train", "train-stream", "train-paper", "train-on-sft", "sft", "kd")
"""Stages that train; what they say of themselves is kept."""
DISTILLED = ("sft", "kd")
TRANSFER = (("s2t-local", "greedy"), ("sft", "greedy"), ("s2t-local", "sft"))
SELECTING = tuple(arm for arm in ARMS if arm.startswith("s2t-local"))
PAIRS = (
    *((arm, "greedy") for arm in ("self-consistency", "llm", "takeover", "s2t", *SELECTING, *DISTILLED)),
    *(("s2t-local", arm) for arm in ("self-consistency", *DISTILLED, "s2t-local-paper")),
    *(("s2t-local-stream", arm) for arm in ("s2t-local", "self-consistency", *DISTILLED)),
    ("kd", "sft"),
    ("s2t-local-on-sft", "sft"),
    ("s2t", "takeover"),
    ("s2t", "llm"),
    *((f"{task} {left}", f"{task} {right}") for task in ("svamp", "humaneval") for left, right in TRANSFER),
)
LLM_COST = 3.1
"""Parameters of the LLM over those of the SLM: what a forward of it counts in the picture."""
COSTS = {"slm_forwards": "slm_forwards", "slm_tokens": "generated", "llm_forwards": "llm_forwards"}


def main() -> None:
    runs = Path(sys.argv[1])
    rows = {arm: found for arm in ARMS if (found := read_rows(folder(runs, arm), ARMS[arm][1]))}
    if missing := [arm for arm in ARMS if arm not in rows]:
        print(f"not there, left out: {', '.join(missing)}", file=sys.stderr)
    document = {
        "slm": "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "llm": "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "weights": WEIGHTS,
        "task": "gsm8k",
        "arms": {arm: describe(found, runs, arm) for arm, found in rows.items()},
        "paired": {f"{left} vs {right}": compare(rows[left], rows[right]) for left, right in known(PAIRS, rows)},
        "sufficiency": {read_json(path)["task"]: sufficiency(path) for path in measured(runs)},
        "training": {name: read_json(found) for name in TRAINED for found in trained(runs / name)},
    }
    write_json(DOCS / "results" / "real-pair.json", document)
    write_json(DOCS / "results" / "real-pair-summaries.json", summaries(runs, rows))
    write_text(DOCS / "results" / "real-pair-questions.csv", questions(rows))
    write_bytes(DOCS / "images" / "real_pair.png", draw_charts([hits(document), costs_of(document)]))
    print(table(document))


def folder(runs: Path, arm: str) -> Path:
    """The arm's own run folder where there is one, else the recipe's."""
    alone = runs / arm.replace(" ", "-")
    return alone if (alone / "summary.json").exists() else runs / ARMS[arm][0]


def read_rows(run: Path, strategy: str) -> dict[str, dict[str, Any]]:
    """Results of one strategy by problem; empty where the run is not finished."""
    if not (run / "summary.json").exists():
        return {}
    return {row["problem_id"]: row for row in read_jsonl(run / "results.jsonl") if row["strategy"] == strategy}


def trained(run: Path) -> list[Path]:
    return [path for name in ("train.json", "distill.json") if (path := run / name).exists()]


def summaries(runs: Path, arms: Any) -> dict[str, Any]:
    """What each run said of itself, but for where its models lay."""
    found = {run.name: read_json(run / "summary.json") for run in sorted({folder(runs, arm) for arm in arms})}
    return {name: {key: value for key, value in one.items() if key != "pair"} for name, one in found.items()}


def questions(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line per question, a column per arm."""
    names = dict.fromkeys(name for found in rows.values() for name in found)
    lines = [
        ",".join([name, *(str(int(found[name]["is_correct"])) if name in found else "" for found in rows.values())])
        for name in names
    ]
    return "\n".join([",".join(["question", *rows]), *lines]) + "\n"


def describe(rows: dict[str, dict[str, Any]], runs: Path, arm: str) -> dict[str, Any]:
    correct = np.array([row["is_correct"] for row in rows.values()])
    strategy = ARMS[arm][1]
    costs = {name: sum(row["cost"][key] for row in rows.values()) for name, key in COSTS.items()}
    if strategy == "llm":
        costs["slm_tokens"] = 0
    return {
        "accuracy": float(correct.mean()),
        "ci95": wilson_interval(int(correct.sum()), len(correct)),
        "num_problems": len(correct),
        **costs,
        "seconds": read_json(folder(runs, arm) / "summary.json")["strategies"][strategy]["seconds"] or None,
        "trigger_rate": sum(row["num_triggered"] for row in rows.values()) / max(1, costs["slm_tokens"]),
        "flip_rate": sum(row["num_flips"] for row in rows.values()) / max(1, costs["slm_tokens"]),
    }


def compare(left: dict[str, dict[str, Any]], right: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Paired on the problems that both arms have."""
    shared = [name for name in left if name in right]
    found = paired_comparison(*([rows[name]["is_correct"] for name in shared] for rows in (left, right)))
    return {"num_problems": len(shared), **found}


def known(pairs: Any, rows: dict[str, Any]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in pairs if left in rows and right in rows]


def measured(runs: Path) -> list[Path]:
    return sorted(runs.glob("sufficiency-*/measure.json")) or sorted(runs.glob("measure/measure.json"))


def sufficiency(path: Path) -> dict[str, Any]:
    found = read_json(path)
    rates = {k: found["hit_rate"][k] for k in ("1", "2", "4", "8", "16") if k in found["hit_rate"]}
    names = ("num_problems", "num_steps", "num_divergence_points", "split")
    manifest = read_json(path.parent / "manifest.json")["config"]
    return {**rates, "ci95": found["hit_rate_ci95"], **{name: {**manifest, **found}[name] for name in names}}


def hits(document: dict[str, Any]) -> dict[str, Any]:
    """hit@K by task, as `draw_charts` takes it."""
    series = []
    for task, found in document["sufficiency"].items():
        ks = [k for k in ("1", "2", "4", "8", "16") if k in found]
        one = {"name": task, "x": [int(k) for k in ks], "y": [found[k] for k in ks]}
        series.append(one | {"ci95": [found["ci95"].get(k) for k in ks]})
    labels = {"x_label": "K, candidates of the 0.5B", "y_label": "the 1.5B's token is among them (%)"}
    return {**labels, "kind": "line", "log_x": True, "series": series}


def costs_of(document: dict[str, Any]) -> dict[str, Any]:
    """Accuracy on the task against the forwards of an answer, greedy's being 1."""
    left_out = ("takeover", "s2t-local@entropy", "s2t-local-paper@weight-0", "s2t-local-on-sft")  # others stand there
    inside = [arm for arm in document["arms"] if ARMS[arm][0].startswith(document["task"]) and arm not in left_out]
    own = {arm: document["arms"][arm] for arm in inside}
    if "s2t" in own and own["s2t"]["llm_forwards"] >= own["s2t"]["slm_tokens"]:  # undrafted: an earlier run's point
        del own["s2t"]
        own["s2t, drafted"] = read_json(DOCS / "results" / "real-pair-earlier.json")["arms"]["s2t"]
    paid = {
        arm: (one["slm_forwards"] + LLM_COST * one["llm_forwards"]) / one["num_problems"] for arm, one in own.items()
    }
    series = [
        {"name": arm, "x": [paid[arm] / paid["greedy"]], "y": [one["accuracy"]], "ci95": [one["ci95"]]}
        for arm, one in own.items()
    ]
    labels = {"x_label": "cost of an answer (greedy = 1)", "y_label": "accuracy on GSM8K (%)"}
    return {**labels, "kind": "line", "log_x": True, "series": series}


def table(document: dict[str, Any]) -> str:
    head = (
        "| arm | n | accuracy % | 95 % | against greedy, points | SLM tokens | SLM forwards | LLM forwards | seconds |"
    )
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for arm, one in document["arms"].items():
        low, high = one["ci95"]
        pair = document["paired"].get(f"{arm} vs greedy")
        gain = "–" if pair is None else f"{100 * pair['difference']:+.1f} (p = {pair['p_value']:.3g})"
        cells = (arm, one["num_problems"], f"{100 * one['accuracy']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", gain)
        found = (one[name] for name in ("slm_tokens", "slm_forwards", "llm_forwards", "seconds"))
        costs = ["–" if value is None else f"{value:,.0f}" for value in found]
        lines.append(f"| {' | '.join(map(str, (*cells, *costs)))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
