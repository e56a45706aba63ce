"""`s2t eval` runs every method by name on the embedded pair, and a run that lost shards writes the same results again."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t import workflows
from s2t.config import METHODS as ALL
from s2t.config import OVER_ANSWERS, EvalConfig
from s2t.evaluate import evaluate
from s2t.files import read_json
from s2t.model.forecast import ForecastConfig, ForecastHead, save_forecast
from s2t.model.router import Router, RouterConfig, save_router

PLAIN = {"greedy", "sample", "llm", "self-consistency", "takeover", "s2t", "s2t-local"}
METHODS = (
    *(name for name in ALL if name not in PLAIN and name not in OVER_ANSWERS),
    *("takeover@criticality", "s2t@criticality", "takeover@step-entropy"),
)
NO_LLM = {"context-aware", "dola", "multiplex", "confidence", "forecast", "self-certainty", "local-branch"}
SMALL = {"llm": "tiny:llm", "max_new_tokens": 32, "shard_size": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_slm):
    """Folders of an adapter of readout bins, a router and forecasts, and a run to learn from; nothing in them is any good."""
    out, hidden = tmp_path_factory.mktemp("trained"), tiny_slm.model.config.hidden_size
    save_router(Router(RouterConfig(tiny_slm.name, hidden)), out / "router")
    save_forecast(ForecastHead(ForecastConfig(tiny_slm.name, hidden, (4.0, 12.0))), out / "forecast")
    workflows.collect(limit=8, out=str(out / "collect"), **SMALL | {"max_new_tokens": 64}, calibration=_thresholds(out))
    settings = {"readout": "bins", "epochs": 1.0, "batch_groups": 8, "heldout_problems": 0.0}
    workflows.train(groups=str(out / "collect"), out=str(out / "train"), **settings)
    workflows.evaluate(strategies="confidence,llm", split="calibration", limit=4, out=str(out / "known"), **SMALL)
    folders = {name: str(out / name) for name in ("router", "forecast", "known")}
    return folders | {"adapter": str(out / "train" / "adapter"), "calibration": _thresholds(out)}


def _thresholds(out):
    path = out / "calibration.json"
    path.write_text('{"thresholds": {"divergence": 0.05}}')
    return str(path)


def test_every_method_runs_by_name_and_resumed_is_whole(trained, tmp_path):
    names = (*METHODS, *OVER_ANSWERS)
    settings = SMALL | trained | {"limit": 3, "num_samples": 2, "lookahead": 2, "num_traces": 0}
    config = EvalConfig(strategies=",".join(names), out=str(tmp_path), **settings)
    scores = evaluate(config)["strategies"]
    whole = Path(config.out, "results.jsonl").read_bytes()
    assert set(names) <= set(scores) <= {*names, "llm"}
    assert {scores[name]["num_problems"] for name in names} == {3}
    reads = {name for name in METHODS if scores[name]["llm_forwards"]}
    assert {"speculative", "specreason", "contrastive", "released"} <= reads
    assert not reads & NO_LLM
    for name in METHODS:
        (tmp_path / f"results-{name}-00001.json").unlink()
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["status"] == "complete"
    evaluate(config)
    assert Path(config.out, "results.jsonl").read_bytes() == whole
