"""The router: what it is trained on is what the continuations say, a killed run goes on, and r2r runs with what was written."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from s2t import workflows
from s2t.errors import ConfigError, DataError, ModelError
from s2t.files import read_json
from s2t.model.load import load_model
from s2t.model.router import load_router

SMALL = {"limit": 6, "max_new_tokens": 64, "max_partings": 2, "calibration_limit": 4, "num_steps": 20, "shard_size": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("router")
    return out, workflows.train_router(out=str(out), **SMALL)


def test_a_killed_run_goes_on_and_writes_the_same_router(trained):
    out, found = trained
    weights = (out / "router" / "router.safetensors").read_bytes()
    for name in ("router/router.safetensors", "router/router.json", "router-run.json"):
        (out / name).unlink()
    next(out.glob("partings-*1.json")).unlink()
    assert workflows.train_router(out=str(out), **SMALL) == found
    assert (out / "router" / "router.safetensors").read_bytes() == weights
    assert load_router(out / "router").config.threshold == found["threshold"]


def test_a_place_that_parted_is_one_where_the_slm_writes_another_token(trained, tiny_slm):
    from s2t.model.engine import Engine

    out, found = trained
    paths = [path for file in sorted(out.glob("partings-*.json")) for path in read_json(file)]
    marks = [mark for path in paths for _, mark in path["places"]]
    assert (len(paths), sum(marks)) == (6, found["num_parted"]) and found["num_parted"] > 0
    for path in paths:
        for step, _ in path["places"]:
            engine = Engine(tiny_slm, 1)
            hidden = engine.extend([0], [[*path["prompt_ids"], *path["token_ids"][:step]]])
            assert int(engine.logits(hidden).argmax()) != path["token_ids"][step]


def test_r2r_fires_at_the_routers_threshold(trained, tmp_path):
    out, _ = trained
    settings = {"llm": "tiny:llm", "limit": 3, "max_new_tokens": 48, "num_traces": 0, "router": str(out / "router")}
    found = workflows.evaluate(strategies="greedy,r2r,takeover@router", out=str(tmp_path), **settings)["strategies"]
    assert 0 < found["r2r"]["trigger_rate"] < 0.5
    assert found["r2r"]["trigger_rate"] == found["takeover@router"]["trigger_rate"]


def test_a_pair_of_two_tokenizers_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ModelError, match="have different tokenizers"):
        workflows.train_router(slm="tiny:slm-numbers", out=str(tmp_path), **SMALL)


def test_answers_within_the_warmup_leave_no_rate_to_reach(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("s2t.train.router._readings", lambda *_: np.empty(0))
    out, _ = trained
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("router*", "manifest.json"))
    with pytest.raises(DataError):
        workflows.train_router(out=str(tmp_path / "run"), **SMALL)


def test_a_router_of_another_model_or_none_is_refused_in_one_line(trained, tmp_path):
    out, _ = trained
    with pytest.raises(ModelError, match=r"holds no router\.json"):
        load_router(tmp_path)
    router = load_router(out / "router")
    hidden, embeddings, logits = (load_model("tiny:slm").model.lm_head.weight.detach()[:2, :size] for size in (8, 8, 8))
    with pytest.raises(ModelError, match=r"pass the --router of this SLM"):
        router.read(hidden, embeddings, logits)
    with pytest.raises(ConfigError, match="needs --router"):
        workflows.evaluate(llm="tiny:llm", strategies="r2r", out=str(tmp_path / "x"), limit=1)
