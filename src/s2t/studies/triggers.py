"""Studies of what triggers and of how much is offered: rate sweeps, the quality of criticality, and K."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from s2t.config import EvalConfig
from s2t.core.calibration import threshold_at
from s2t.core.stats import calibration_error, reliability_curve
from s2t.decode.opening import open_pair
from s2t.decode.workload import open_task, requests_for, shards_of
from s2t.files import read_json, read_tables, write_json
from s2t.methods.strategies import build_strategy
from s2t.progress import progress
from s2t.studies.lab import Chart, Findings, Lab, Series

RATES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
KS = (1, 2, 4, 8, 16)
_CUTS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_KINDS = ("divergence", "entropy", "random")


def triggers(lab: Lab) -> Findings:
    """Accuracy against the trigger rate, for takeover, s2t and s2t-local under every trigger; thresholds from calibration."""
    adapter = str(lab.trained())
    steps = read_tables(sorted(lab.measured().glob("steps-*.parquet")), ["divergence", "entropy", "is_warmup"])
    live = ~steps["is_warmup"].to_numpy()
    readings = {name: steps[name].to_numpy()[live] for name in ("divergence", "entropy")}
    readings["criticality"] = _readings(lab, adapter, "calibration", lab.config.calibration_limit)["criticality"]
    summary = lab.evaluated("greedy", "greedy")
    greedy = summary["strategies"]["greedy"]
    rows: list[tuple[Any, ...]] = []
    lines: dict[str, Series] = {}
    for rate in RATES:
        thresholds = {name: threshold_at(values, 1 - rate)[0] for name, values in readings.items()} | {"random": rate}
        scores = _at_rate(lab, rate, thresholds, adapter)
        for name, found in scores.items():
            strategy, _, trigger = name.partition("@")
            fired, flips = found["trigger_rate"], found["flip_rate"]
            rows.append((strategy, trigger, thresholds[trigger], fired, flips, found["accuracy"], found["ci95"]))
            line = lines.setdefault(name, Series(name, [], [], []))
            line.x.append(max(100 * fired, 0.01))
            line.y.append(found["accuracy"])
            line.ci95.append(tuple(found["ci95"]))
    columns = ("strategy", "trigger", "threshold", "triggered %", "flips %", "accuracy %", "95 %")
    chart = Chart("steps triggered (%)", "accuracy (%)", list(lines.values()), log_x=True)
    notes = [
        f"greedy: {100 * greedy['accuracy']:.1f} %.",
        f"Thresholds at trigger rates {', '.join(f'{100 * rate:g} %' for rate in RATES)} of the calibration split; "
        f"random triggers under {lab.config.num_seeds} seeds, whose intervals cover problems and seeds.",
    ]
    return Findings("Accuracy by trigger and rate", columns, sorted(rows, key=lambda r: r[:2]), chart, notes)


def _at_rate(lab: Lab, rate: float, thresholds: dict[str, float], adapter: str) -> dict[str, Any]:
    """Scores of every strategy under every trigger at one rate."""
    name = f"rate-{rate:g}"
    calibration = str(lab.thresholds_file(name, {kind: thresholds[kind] for kind in _KINDS}))
    collaborative = ",".join(f"{strategy}@{kind}" for strategy in ("takeover", "s2t") for kind in _KINDS)
    local = "s2t-local@entropy,s2t-local@random"
    seeds = lab.config.num_seeds
    found = lab.evaluated(name, f"{collaborative},{local}", calibration=calibration, adapter=adapter, num_seeds=seeds)
    own = lab.evaluated(
        f"{name}-local", "s2t-local@criticality", threshold=min(thresholds["criticality"], 1.0), adapter=adapter
    )
    return found["strategies"] | own["strategies"]


def criticality(lab: Lab) -> Findings:
    """How well criticality finds the divergence points of greedy answers: thresholds, ROC, precision and recall, calibration."""
    adapter = str(lab.trained())
    found = _readings(lab, adapter, lab.config.split, lab.config.limit)
    values, truth = found["criticality"], found["divergence"] > lab.thresholds()["divergence"]
    rows = []
    for cut in _CUTS:
        fired = values > cut
        hits = int((fired & truth).sum())
        rows.append((cut, float(fired.mean()), hits / max(int(fired.sum()), 1), hits / max(int(truth.sum()), 1)))
    rivals = {"criticality": values, "SLM's entropy": found["entropy"]}
    series = [Series(f"{name} (AUC {roc_auc_score(truth, v):.3f})", *_roc(v, truth)) for name, v in rivals.items()]
    notes = [
        f"{name}: ROC AUC {roc_auc_score(truth, v):.3f}, average precision {average_precision_score(truth, v):.3f}"
        for name, v in rivals.items()
    ]
    notes.append(
        f"Expected calibration error of criticality: {calibration_error(values, truth):.3f} (it is trained with classes weighted "
        "to be even, and says more than the true rate)."
    )
    notes.append(f"{int(truth.sum())} divergence points among {len(truth)} steps of {lab.config.limit} greedy answers.")
    columns = ("threshold", "fires %", "precision %", "recall %")
    charts = [
        Chart("false positive rate (%)", "true positive rate (%)", series),
        Chart("recall (%)", "precision (%)", [Series(name, *_precision(v, truth)) for name, v in rivals.items()]),
        Chart("criticality (%)", "true share of divergence points (%)", [_reliability(values, truth)]),
    ]
    return Findings("Criticality against the true divergence points", columns, rows, charts, notes)


def candidates(lab: Lab) -> Findings:
    """Accuracy against K, for s2t and s2t-local; the adapter was trained at its own K."""
    adapter, calibration = str(lab.trained()), str(lab.calibrated())
    rows, lines = [], {name: Series(name, [], [], []) for name in ("s2t", "s2t-local")}
    for k in KS:
        settings = {"adapter": adapter, "calibration": calibration, "num_candidates": k}
        scores = lab.evaluated(f"k-{k}", "s2t,s2t-local", **settings)["strategies"]
        for name, line in lines.items():
            found = scores[name]
            rows.append((name, k, found["accuracy"], found["ci95"], found["flip_rate"], found["slm_flops"] / 1e9))
            line.x.append(float(k))
            line.y.append(found["accuracy"])
            line.ci95.append(tuple(found["ci95"]))
    columns = ("strategy", "K", "accuracy %", "95 %", "flips %", "SLM GFLOPs")
    chart = Chart("K, candidates offered", "accuracy (%)", list(lines.values()), log_x=True)
    trained = read_json(lab.trained() / "s2t_config.json")["num_candidates"]
    notes = [f"The adapter was trained at K = {trained}; K = 1 is greedy."]
    return Findings("Accuracy by number of candidates", columns, sorted(rows), chart, notes)


def _readings(lab: Lab, adapter: str, split: str, limit: int) -> dict[str, np.ndarray]:
    """Criticality, divergence and entropy at every step past the warm-up of greedy answers; read once and kept."""
    path = lab.folder / f"readings-{split}.json"
    if not path.is_file():
        write_json(path, {name: values.tolist() for name, values in _read(lab, adapter, split, limit).items()})
    return {name: np.asarray(values) for name, values in read_json(path).items()}


def _read(lab: Lab, adapter: str, split: str, limit: int) -> dict[str, np.ndarray]:
    config = EvalConfig(
        **(lab.models | lab.problems), adapter=adapter, strategies="s2t-local", limit=limit, split=split
    )
    pair = open_pair(config, ["s2t-local", "s2t"])
    task = open_task(config, config.slm, config.revision)
    strategy = build_strategy("s2t-local", config, {"criticality": 1.0})  # never above 1: it reads and writes greedily
    parts: dict[str, list[np.ndarray]] = {"criticality": [], "divergence": [], "entropy": []}
    problems = task.problems(split, limit, config.seed)
    with progress(f"criticality, {split}", len(problems)) as advance:
        for shard in shards_of(problems, config.batch_size):
            requests = requests_for(pair, task, shard)
            done = pair.write(strategy, requests, config.max_new_tokens, keep_steps=True, trace=False)
            labels = pair.label(requests, [sequence.token_ids for sequence in done], 1)
            for sequence, label in zip(done, labels, strict=True):
                skip = config.warmup_steps
                parts["criticality"].append(
                    np.asarray([step.value for step in sequence.steps], dtype=np.float64)[skip:]
                )
                parts["divergence"].append(np.asarray(label.divergence)[skip:])
                parts["entropy"].append(np.asarray(label.entropy)[skip:])
            advance(len(shard))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _reliability(values: np.ndarray, truth: np.ndarray) -> Series:
    bins = reliability_curve(values, truth)
    stated, rates, intervals = ([b[i] for b in bins] for i in range(3))
    return Series("criticality, by tenths", [100 * float(s) for s in stated], list(rates), list(intervals))  # type: ignore[arg-type]


def _precision(values: np.ndarray, truth: np.ndarray) -> tuple[list[float], list[float]]:
    precision, recall = (
        curve[-2::-1] for curve in precision_recall_curve(truth, values)[:2]
    )  # recall rises, from the first cut
    places = np.unique(np.searchsorted(recall, np.linspace(0, 1, 200)).clip(max=len(recall) - 1))
    return (100 * recall[places]).tolist(), precision[places].tolist()


def _roc(values: np.ndarray, truth: np.ndarray) -> tuple[list[float], list[float]]:
    false, true, _ = roc_curve(truth, values, drop_intermediate=False)
    places = np.unique(np.linspace(0, len(false) - 1, 200).astype(int))
    return (100 * false[places]).tolist(), true[places].tolist()
