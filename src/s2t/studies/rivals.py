"""Every method on the same problems and prompts, at matched shares of LLM tokens: what runs, and at which thresholds.

Thresholds come from the calibration split alone: there each method's readings along the SLM's own answers say where it would hand
a given share of the tokens to the LLM. The share that came of it on the test problems stands beside the one that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from s2t.combine import combine, known_answers
from s2t.config import MANY_SAMPLES, EvalConfig, build_config
from s2t.decode.opening import open_pair
from s2t.decode.workload import open_task, requests_for
from s2t.errors import ConfigError
from s2t.files import iter_jsonl, read_json, write_json
from s2t.methods.learned import FrugalGPT, NearestNeighbours
from s2t.methods.strategies import build_strategy
from s2t.records import Problem
from s2t.studies.lab import Findings, Lab
from s2t.studies.rivals_table import Arm, findings
from s2t.tasks.problems import Task

SHARES = (0.02, 0.05, 0.1, 0.2)
NUM_SAMPLES = 8
PLAIN = (
    *("greedy", "s2t-local", "llm", "confidence", "sample", "self-consistency", "self-certainty", "borda", "deepconf"),
    *("contrastive", "context-aware", "dola", "multiplex"),
)
BY_TOKEN = tuple(f"{name}@{kind}" for name in ("takeover", "s2t") for kind in ("divergence", "entropy", "random"))
BY_STEP = ("specreason", "smart", "glimprouter")
TRAINED = ("takeover@criticality", "s2t@criticality")
OVER_ANSWERS = ("cascade", "frugalgpt", "knn-routing")
EVERY = (*PLAIN, "speculative", "zip-rc", "local-branch", *BY_TOKEN, "r2r", *BY_STEP, *TRAINED, *OVER_ANSWERS)
TOKEN_COSTS = (1e-4, 3e-4, 1e-3, 3e-3)
"""Of zip-rc: what a token costs, in right answers."""
LOOKAHEADS = (1, 2, 3)
READERS = {
    "divergence": ("takeover@divergence", "s2t@divergence"),
    "entropy": ("takeover@entropy", "s2t@entropy"),
    "criticality": TRAINED,
    "router": ("r2r",),
    "step-score": ("specreason",),
    "step-confidence": ("smart",),
    "step-entropy": ("glimprouter",),
}
"""Triggers whose readings give thresholds, and the methods that these are for."""
_READING = {user: name for name, users in READERS.items() for user in users} | {
    f"{name}@random": "random" for name in ("takeover", "s2t")
}
_BELOW = ("step-score", "step-confidence", "confidence", "frugalgpt")  # these fire below their threshold
_VOTES = ("borda", "deepconf")
_ADAPTED = ("s2t-local", *TRAINED)


def rivals(lab: Lab) -> Findings:
    """Every method beside ours on the same problems: accuracy against FLOPs and LLM tokens, at matched shares of the tokens."""
    wanted = _wanted(lab.config.method_names)
    shares = lab.config.token_shares or SHARES
    adapter = str(lab.adapted()) if wanted & {*_ADAPTED} else None
    router = str(lab.routed() / "router") if "r2r" in wanted else None
    drawn = {"num_seeds": lab.config.num_seeds, "num_samples": NUM_SAMPLES, "adapter": adapter, "router": router}
    arms = _of(lab, "plain", _among(PLAIN, wanted), None, **drawn)
    arms += _of(lab, "speculative", _among(("speculative",), wanted), None, top_k=1)
    plain = {arm.method: arm for arm in arms}
    arms += _foretold(lab) if "zip-rc" in wanted else []
    arms += _branches(lab) if "local-branch" in wanted else []
    over = _among(OVER_ANSWERS, wanted)
    if over:
        lab.evaluated("known", "confidence,llm", split="calibration", limit=lab.config.calibration_limit)
    readings = _readings(lab, [name for name, users in READERS.items() if wanted & {*users}], adapter, router)
    found: dict[tuple[str, float], Arm] = {}
    for share in shares:
        thresholds = {name: threshold_for(name, values, share) for name, values in readings.items()} | {"random": share}
        name = f"share-{share:g}"
        calibration = str(lab.thresholds_file(name, thresholds))
        names = _among((*BY_TOKEN, "r2r", *BY_STEP), wanted)
        at = {method: (method, thresholds[_READING[method]]) for method in names}
        new = [method for method in names if at[method] not in found]  # marks of 0 to 9 have few thresholds
        found |= {at[arm.method]: arm for arm in _of(lab, name, new, share, **drawn, calibration=calibration)}
        arms += [replace(found[at[method]], share=share) for method in names]
        own = thresholds.get("criticality")
        arms += _of(lab, f"{name}-trained", _among(TRAINED, wanted), share, adapter=adapter, threshold=own)
        arms += _over_answers(lab, over, share, plain) if over else []
    return findings(lab, [arm for arm in arms if arm.method in wanted], shares)


def _wanted(names: Sequence[str]) -> set[str]:
    """The methods that run, with those that others need."""
    unknown = [name for name in names if name not in EVERY]
    if unknown:
        raise ConfigError(f"methods must be of {', '.join(EVERY)}; got {', '.join(unknown)}.")
    wanted = {"greedy", *names} if names else {*EVERY}
    wanted |= {"confidence", "llm"} if wanted & {*OVER_ANSWERS} else set()
    return wanted | ({"self-certainty"} if wanted & {*_VOTES} else set())


def _among(names: Sequence[str], wanted: set[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in wanted)


def threshold_for(name: str, values: Sequence[float], share: float) -> float:
    """The threshold at which a reading fires nearest to such a share of the tokens; readings that tie cannot be parted."""
    found, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    margin = 1e-6 + 1e-3 * np.abs(found[[0, -1]])
    passed = np.cumsum(counts) / len(values)  # at or below each reading
    if name in _BELOW:
        cuts, rates = np.r_[found, found[-1] + margin[1]], np.r_[0.0, passed]
    else:
        cuts, rates = np.r_[found[0] - margin[0], found], np.r_[1.0, 1 - passed]
    return float(cuts[np.abs(rates - share).argmin()])


def _of(lab: Lab, folder: str, names: Sequence[str], share: float | None, **settings: Any) -> list[Arm]:
    """Arms of one evaluation, in a folder of its own; none of no methods."""
    if not names:
        return []
    if not {*MANY_SAMPLES}.intersection(names):
        settings.pop("num_samples", None)  # which none of them reads
    found = lab.evaluated(folder, ",".join(names), **settings)["strategies"]
    by_name = results_by_name(lab.folder / folder)
    return [Arm(name, share, by_name[name], found[name]["seconds"]) for name in names]


def results_by_name(folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """The results of an evaluation, strategy by strategy, seed by seed."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for _, result in iter_jsonl(folder / "results.jsonl"):
        found.setdefault(result["strategy"], {}).setdefault(result["seed"], []).append(result)
    return {name: list(seeds.values()) for name, seeds in found.items()}


def _foretold(lab: Lab) -> list[Arm]:
    """zip-rc at several costs of a token, over the same samples."""
    forecast = str(lab.foretold() / "forecast")
    settings = {"forecast": forecast, "num_samples": NUM_SAMPLES}
    [samples] = _of(lab, "zip-rc", ("forecast",), None, **settings, num_seeds=lab.config.num_seeds)
    problems, task = _problems(lab)
    arms = []
    for cost in TOKEN_COSTS:
        own = build_config(EvalConfig, flags=lab.settings(settings | {"strategies": "zip-rc", "threshold": cost}))
        runs = combine("zip-rc", own, task, problems, {"forecast": [(rows, 0.0) for rows in samples.rows]})
        arms.append(Arm("zip-rc", None, [run[0] for run in runs], label=f"zip-rc, {cost:g} a token"))
    return arms


def _branches(lab: Lab) -> list[Arm]:
    """local-branch at several depths; what scores is an adapter of readout bins, whose depth 1 is the tree step of s2t-local.

    An adapter that was given stands in its place from two tokens ahead on, where either readout can score.
    """
    given = lab.config.adapter
    adapter = given or str(lab.trained("train-bins", readout="bins"))
    arms = []
    for depth in LOOKAHEADS if given is None else LOOKAHEADS[1:]:
        [arm] = _of(lab, f"branch-{depth}", ("local-branch",), None, adapter=adapter, lookahead=depth)
        arms.append(replace(arm, label=f"local-branch, {depth} ahead"))
    return arms


def _problems(lab: Lab) -> tuple[list[Problem], Task]:
    config = build_config(EvalConfig, flags=lab.settings({"limit": lab.config.limit}))
    task = open_task(config, config.slm, config.revision)
    return task.problems(lab.config.split, lab.config.limit, lab.config.seed), task


def _over_answers(lab: Lab, names: Sequence[str], share: float, plain: Mapping[str, Arm]) -> list[Arm]:
    """Cascades and routing over the answers that are there, at thresholds from the calibration split."""
    known = str(lab.folder / "known")
    config = build_config(EvalConfig, flags=lab.settings({"known": known, "limit": lab.config.limit}))
    problems, task = _problems(lab)
    results = {name: [(rows, 0.0) for rows in plain[name].rows] for name in ("confidence", "llm")}
    values = _known_values(config, problems)
    arms = []
    for name in names:
        at = threshold_for("confidence" if name == "cascade" else name, values[name], share)
        own = build_config(EvalConfig, flags=lab.settings({"strategies": name, "known": known, "threshold": at}))
        arms.append(Arm(name, share, [run[0] for run in combine(name, own, task, problems, results)]))
    return arms


def _known_values(config: EvalConfig, problems: Sequence[Problem]) -> dict[str, list[float]]:
    """What decides in each method over answers, on the calibration problems that it learns from."""
    pool = known_answers(config, problems)
    scorer, neighbours = FrugalGPT(config, {}, pool), NearestNeighbours(config, {}, pool)
    return {
        "cascade": [one["confidence"]["value"] for one in pool.answers],
        "frugalgpt": [scorer.score(one["confidence"]) for one in pool.answers],
        "knn-routing": [neighbours.gain(question) for question in pool.questions],
    }


def _readings(lab: Lab, names: Sequence[str], adapter: str | None, router: str | None) -> dict[str, list[float]]:
    """What triggers read at each token past their warm-up of the SLM's calibration answers; read once and kept."""
    if not names:
        return {}
    path = lab.folder / "readings.json"
    if not path.is_file():
        write_json(path, _read(lab, names, adapter, router))
    return read_json(path)


def _read(lab: Lab, names: Sequence[str], adapter: str | None, router: str | None) -> dict[str, list[float]]:
    flags = lab.settings({"adapter": adapter, "router": router, "strategies": "takeover", "split": "calibration"})
    config = build_config(EvalConfig, flags=flags)
    pair = open_pair(config, [f"takeover@{name}" for name in names])
    task = open_task(config, config.slm, config.revision)
    requests = requests_for(pair, task, task.problems("calibration", lab.config.calibration_limit, config.seed))
    found = {}
    for name in names:
        never = -math.inf if name in _BELOW else math.inf
        own = build_config(EvalConfig, flags=flags | {"trigger": name, "threshold": never})
        strategy = build_strategy("takeover", own, {})
        done = pair.write(strategy, requests, config.max_new_tokens, keep_steps=True, trace=False)
        found[name] = [
            v for s in done for v in _filled([step.value or 0.0 for step in s.steps])[strategy.warmup_steps :]
        ]
    return found


def _filled(values: Sequence[float]) -> list[float]:
    """Readings of a step's first token hold for all of its tokens; -1 says that a token begins none."""
    filled: list[float] = []
    for value in values:
        filled.append(filled[-1] if value == -1.0 and filled else value)
    return filled
