"""The whole method on the embedded pair, offline: measure, calibrate, collect, train, evaluate, report.

Each step is the ordinary workflow with its own run folder, so a killed demo resumes where it stopped.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from s2t.files import write_json
from s2t.model.tiny import model_card_note
from s2t.report import write_report
from s2t.workflows import Stage

STRATEGIES = "greedy,self-consistency,takeover,s2t,s2t-local,llm"
NUM_TEST = 1000
NUM_SUFFICIENCY = 3000  # test problems; few solutions that go astray hold many of the misses, so hit rates need more
NUM_CALIBRATION = 1000
NUM_TRAIN = 6000
QUANTILE = 0.97
POLICY = "s2t"
TASK = "rg:gsm_symbolic,max_number=100"
SLM, LLM = "tiny:slm", "tiny:llm"
TRAIN_SETTINGS: dict[str, Any] = {
    "learning_rate": 5e-3,
    "batch_groups": 64,
    "epochs": 6.0,
    "lora_rank": 16,
    "lora_dropout": 0.1,
}
"""What calibration problems chose for the embedded pair; every try is in docs/log.md."""
NUM_TRACES = 32  # of the report; reading more again would take as long as the evaluation
SUFFICIENCY = ("num_problems", "num_divergence_points", "trigger_rate", "hit_rate", "hit_rate_ci95")


def demo(out: str = "runs/demo", seed: int = 0, limit: int | None = None, groups: int | None = None) -> dict[str, Any]:
    """Run the main job in `out` and return summary.json; `limit` test problems, selector training on `groups` problems."""
    torch.set_num_threads(1)  # models this small lose more to waiting for each other than a second thread brings
    folder = Path(out)
    num_test, num_train = limit or NUM_TEST, groups or NUM_TRAIN
    names = {name: str(folder / name) for name in ("measure", "calibrate", "collect", "train", "sufficiency", "eval")}
    common: dict[str, Any] = {
        "slm": SLM,
        "llm": LLM,
        "task": TASK,
        "seed": seed,
        "workers": min(2, os.cpu_count() or 1),
    }

    def run(step: int, about: str, name: str, command: str, **settings: Any) -> dict[str, Any]:
        _say(step, about)
        return Stage(name, command, {**settings, "out": names[name]}).run()

    measured = {"limit": min(NUM_CALIBRATION, 4 * num_test), "quantile": QUANTILE}
    run(1, "measure the pair on calibration problems", "measure", "measure", **common, **measured)
    thresholds = run(
        2,
        "calibrate the divergence threshold",
        *("calibrate", "calibrate"),
        run=names["measure"],
        quantile=QUANTILE,
    )
    collected = {"limit": num_train, "calibration": names["calibrate"] + "/calibration.json", "policy": POLICY}
    run(3, "collect selection groups from training problems", "collect", "collect", **common, **collected)
    trained = {"slm": SLM, "groups": names["collect"], "seed": seed, **TRAIN_SETTINGS}
    run(4, "train the selector", "train", "train", **trained)
    tested = {"limit": min(NUM_SUFFICIENCY, 3 * num_test), "threshold": thresholds["thresholds"]["divergence"]}
    found = run(
        5,
        "measure local sufficiency on test problems",
        *("sufficiency", "measure"),
        **common,
        split="test",
        **tested,
    )
    evaluated = {
        "limit": num_test,
        "strategies": STRATEGIES,
        "calibration": collected["calibration"],
        "adapter": names["train"] + "/adapter",
        "num_traces": NUM_TRACES,
        "card": True,
    }
    summary = run(6, "evaluate every strategy on test problems", "eval", "eval", **common, **evaluated)
    summary["sufficiency"] = {key: found[key] for key in SUFFICIENCY}
    write_json(folder / "summary.json", summary)
    page = write_report(names["eval"], out=folder, measure=names["sufficiency"], note=model_card_note(SLM))
    _say(7, f"report written: {page}")
    return summary


def _say(step: int, text: str) -> None:
    print(f"[{step}/7] {text}", file=sys.stderr, flush=True)
