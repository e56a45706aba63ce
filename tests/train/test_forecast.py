"""Forecasts of zip-rc: examples are what the samples say, a killed run goes on, and the head learns which samples end right."""

from __future__ import annotations

import pytest
import torch

from s2t import workflows
from s2t.errors import ConfigError, DataError, ModelError
from s2t.files import read_json
from s2t.model.engine import Engine
from s2t.model.forecast import EDGES, length_bin, load_forecast
from s2t.train.forecast import _examples

SMALL = {"method": "zip-rc", "limit": 8, "max_new_tokens": 64, "num_samples": 2, "num_steps": 60, "shard_size": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("forecast")
    return out, workflows.train_router(out=str(out), **SMALL)


def rows_of(out):
    return [row for file in sorted(out.glob("samples-*.json")) for row in read_json(file)]


def test_a_killed_run_goes_on_and_writes_the_same_head(trained):
    out, found = trained
    weights = (out / "forecast" / "forecast.safetensors").read_bytes()
    for name in ("forecast/forecast.safetensors", "forecast/forecast.json", "router-run.json"):
        (out / name).unlink()
    next(out.glob("samples-*1.json")).unlink()
    assert workflows.train_router(out=str(out), **SMALL) == found
    assert (out / "forecast" / "forecast.safetensors").read_bytes() == weights


def test_an_example_is_the_state_before_a_token_with_what_came_of_it(trained, tiny_slm):
    rows = rows_of(trained[0])
    states, right, left = _examples(tiny_slm, rows)
    place = 0
    for row in rows:
        for tokens, mark in row["samples"]:
            steps = sorted({*range(0, len(tokens), 8), len(tokens) - 1})
            for step in steps:
                engine = Engine(tiny_slm, 1)
                alone = engine.extend([0], [[*row["prompt_ids"], *tokens[:step]]])[0]
                torch.testing.assert_close(states[place], alone, rtol=1e-4, atol=1e-4)
                assert (bool(right[place]), int(left[place])) == (mark, len(tokens) - step)
                place += 1
    assert place == len(states)


def test_bins_hold_what_lies_between_their_edges():
    assert [length_bin(n) for n in (1, 7, 8, 15, 16, 511, 512, 10**6)] == [0, 0, 1, 1, 2, 6, 7, 7]
    assert len(EDGES) == 7


def test_the_head_tells_samples_that_end_right_from_others_and_soon_from_late(trained, tiny_slm):
    out, found = trained
    rows = [row for place, row in enumerate(rows_of(out)) if place % 10]
    states, right, left = _examples(tiny_slm, rows)
    joint = load_forecast(out / "forecast").read(states)
    torch.testing.assert_close(joint.sum((1, 2)), torch.ones(len(states)))
    assert right.any() and not right.all()
    assert joint[right, 1].sum(-1).mean() > joint[~right, 1].sum(-1).mean() + 0.1
    soon = joint[:, :, :2].sum((1, 2))
    assert soon[left < 16].mean() > soon[left >= 16].mean() + 0.3
    assert 0 < found["right_rate"] < 1


def test_what_cannot_be_foretold_with_is_refused_in_one_line(trained, tmp_path):
    out, _ = trained
    with pytest.raises(ModelError, match=r"holds no forecast\.json"):
        load_forecast(tmp_path)
    with pytest.raises(ModelError, match="pass the --forecast of this SLM"):
        load_forecast(out / "forecast").read(torch.zeros(1, 5))
    with pytest.raises(ConfigError, match="zip-rc needs --forecast"):
        workflows.evaluate(strategies="zip-rc", out=str(tmp_path / "x"), limit=1)
    with pytest.raises(DataError, match="none of the samples is right"):
        workflows.train_router(out=str(tmp_path / "y"), **SMALL | {"limit": 1, "max_new_tokens": 2})
