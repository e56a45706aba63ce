"""The bench: what it runs does the work it says, the measuring is fair, and the slow references agree with the fast paths."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from s2t.bench import bench
from s2t.bench.decode import DecodeBench, exact_keys, local_name, untrained_adapter
from s2t.bench.limit import LimitBench
from s2t.bench.shapes import SHAPES, open_model
from s2t.bench.timing import in_turns, ratio
from s2t.bench.train import TrainBench
from s2t.cli.main import main
from s2t.config import BenchConfig
from s2t.core.sampling import uniforms
from s2t.errors import ConfigError
from s2t.model.engine import Engine

CPU = torch.device("cpu")
SMALL = {"batch_size": 2, "prompt_tokens": 12, "max_new_tokens": 20, "repeats": 1}


def script(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def naive():
    return script("naive")


def test_contestants_advance_in_turns_and_the_warm_up_is_not_counted():
    order = []

    def contestant(name):
        def run():
            for number in range(4):
                order.append((name, number))
                yield

        return run

    seconds = in_turns({"a": contestant("a"), "b": contestant("b")}, CPU, rounds=2, warmup_rounds=1, chunk=2)
    assert order[:8] == [(n, i) for part in ((0, 1), (2, 3)) for n in "ab" for i in part]
    assert len(order) == 3 * 8
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert ratio({"x": [2.0, 9.0, 4.0], "y": [1.0, 3.0, 1.0]}, "x", "y") == 3.0


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.1])
def test_the_random_trigger_fires_exactly_as_often_as_asked(rate):
    keys = exact_keys(rate, 5, 100, 3, seed=1)
    assert len(set(keys)) == 5
    for key in keys:
        assert int((uniforms(1, key, 100)[3:] < rate).sum()) == round(100 * rate)


def test_decoding_is_timed_against_transformers_and_greedy():
    config = BenchConfig(**SMALL, slm="tiny:slm-small", llm="tiny:llm", trigger_rates="0,0.1")
    result = bench(config)
    names = {"transformers", "greedy", "s2t-local 0 %", "s2t-local 10 %", "s2t step by step", "s2t drafted"}
    assert set(result["seconds"]) == set(result["tokens_per_s"]) == names
    assert all(value > 0 for value in result["seconds"].values())
    assert set(result["local_time_to_greedy"]) == {"0", "0.1"}
    forwards = result["slm_forwards_per_token"]
    assert forwards["greedy"] == forwards["s2t-local 0 %"] == 1.0
    assert forwards["s2t-local 10 %"] >= 1.0
    llm = result["llm_forwards_per_token"]
    assert llm["s2t drafted"] < llm["s2t step by step"] == 1.0
    assert json.loads(json.dumps(result)) == result


def test_greedy_of_the_bench_writes_what_transformers_writes():
    work = DecodeBench(BenchConfig(**SMALL, slm="tiny:slm-small"))
    runs = work.contestants()
    [reference] = list(runs["transformers"]())
    ours = [[], []]
    for step in runs["greedy"]():
        ours[step.request].append(step.token_id)
    excluded = {1, *work.base.reserved.all}  # transformers suppresses the stop id here, and may emit reserved ids
    for left, right in zip(ours, reference[:, 12:].tolist(), strict=True):
        end = next((i for i, pair in enumerate(zip(left, right, strict=True)) if excluded & set(pair)), 20)
        assert end > 5
        assert left[:end] == right[:end]


def test_collecting_by_prefill_finds_the_groups_of_step_by_step():
    config = BenchConfig(
        work="collect",
        slm="tiny:slm-small",
        llm="tiny:llm",
        limit=6,
        repeats=1,
        max_new_tokens=48,
        trigger_rates="0.05",
    )
    result = bench(config)
    assert set(result["groups_per_s"]) == {"step by step", "prefill"}
    counts = result["num_groups"]
    assert counts["prefill"] == counts["step by step"] > 0


def test_a_training_step_is_timed():
    result = bench(
        BenchConfig(work="train", slm="tiny:slm-small", prompt_tokens=40, groups=3, repeats=2, num_candidates=4)
    )
    assert result["groups_per_s"] == pytest.approx(3 / result["seconds"]["training step"])


def test_every_stage_is_timed_against_its_own_weight_products():
    config = BenchConfig(
        work="limit",
        slm="tiny:slm-small",
        llm="tiny:llm",
        batch_sizes="1,3",
        prompt_tokens=12,
        max_new_tokens=10,
        repeats=1,
        groups=2,
        trigger_rates="0.1",
    )
    result = bench(config)
    names = {f"{stage}, batch {size}" for stage in ("rollout", "s2t-local 10 %") for size in (1, 3)}
    names |= {"s2t drafted, batch 3", "s2t drafted, with traces, batch 3", "labelling", "training step"}
    assert set(result["time_to_products"]) == set(result["per_s"]) == names
    assert set(result["local_time_to_greedy"]) == {"1", "3"}
    assert json.loads(json.dumps(result)) == result


@pytest.mark.slow
def test_two_checkouts_are_measured_in_turns(capfd):
    here = str(Path(__file__).parents[1])
    sizes = ["--batch-sizes", "2", "--prompt-tokens", "12", "--max-new-tokens", "10", "--rate", "0.1", "--groups", "2"]
    models = ["--slm", "tiny:slm-small", "--llm", "tiny:llm", "--dtype", "float32"]
    script("before").main([here, *models, *sizes, "--repeats", "1", "--only", "rollout,s2t drafted,labelling,training"])
    *lines, last = capfd.readouterr().out.splitlines()
    found = json.loads(last)
    names = {"rollout, batch 2", "s2t drafted, batch 2", "s2t drafted, with traces, batch 2", "labelling"}
    assert set(found) == names | {"training step, 2 groups"} and len(lines) == len(found)
    assert all(value > 0 for one in found.values() for value in one.values())


def test_the_products_of_a_rollout_are_those_of_its_layers_at_its_rows():
    config = BenchConfig(
        slm="tiny:slm-small", batch_sizes="2", prompt_tokens=12, max_new_tokens=10, trigger_rates="0.1"
    )
    work = LimitBench(config)
    runs = work.contestants()
    [_] = runs["rollout, batch 2"]()
    model = work.decode.base.model
    layers = sum(
        layer.weight.numel()
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings()
    )
    head = model.get_output_embeddings().weight.numel()
    assert work.products["rollout, batch 2"].flops == 2.0 * (2 * (12 + 9) * layers + 2 * 10 * head)
    [_] = runs["training step"]()
    noted = work.products["training step"].noted
    assert {one.is_trained_through for one in noted} == {True, False}  # the prefix is read without gradients
    lora = [one for one in noted if 16 in one.weight.shape]  # what is trained, on the groups' own tokens alone
    assert len(lora) == 2 * len(work.train.trainer.adapter.layers)
    assert all(one.is_trained and one.rows == work.config.groups for one in lora)
    assert sum(one.is_trained for one in noted) == len(lora)


def test_the_script_for_a_gpu_runs_on_a_cpu(capsys):
    script("gpu").main(["--shape", "tiny", "--ways", "eager,static"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["same_tokens"] == {"eager": True, "static": True}
    assert set(result["local"]["local_over_greedy"]) == {"1", "4"}
    assert 0 < result["drafted"]["llm_forwards_per_token"] < 1
    assert "labelling" in result["limit"]["time_to_products"]
    assert all(isinstance(found, dict) for name, found in result.items() if name in ("bandwidth", "greedy", "versions"))


def test_the_naive_training_step_has_the_loss_of_ours(naive):
    config = BenchConfig(
        work="train",
        slm="tiny:slm-small",
        dtype="float32",
        prompt_tokens=40,
        num_candidates=4,
        readout="bins",
        adapter_scope="always",
    )
    ours, slow = TrainBench(config), TrainBench(config)
    for _ in range(3):
        [_] = list(ours.contestants()["training step"]())
        assert naive.training_step(slow.trainer, slow.batch) == pytest.approx(ours.loss, rel=1e-4)


def test_naive_scores_are_those_of_a_tree_step(naive):
    loaded = open_model("tiny:slm-small", "float32", "cpu", False)
    adapter = untrained_adapter(loaded, "bins", "always")
    prompt = list(range(20, 50))
    engine = Engine(loaded, 1, adapter)
    logprobs, ids = engine.logits(engine.extend([0], [prompt])).log_softmax(-1).topk(5)
    tree = adapter.scores(engine.branch([0], ids), ids, logprobs)[0]
    torch.testing.assert_close(
        tree, naive.score_candidates(adapter, prompt, ids[0].tolist(), logprobs[0]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("readout", "scope"),
    [
        ("rank", "step"),
        pytest.param("rank", "stream", marks=pytest.mark.slow),
        pytest.param("bins", "candidates", marks=pytest.mark.slow),
    ],
)
def test_what_is_timed_flips_some_of_its_triggers(readout, scope):
    config = {"dtype": "float32", "batch_size": 2, "prompt_tokens": 16, "max_new_tokens": 20, "trigger_rates": "0.5"}
    timed = DecodeBench(BenchConfig(slm="random:qwen2.5-0.5b,layers=1", readout=readout, adapter_scope=scope, **config))
    steps = list(timed.contestants()[local_name(0.5)]())
    assert 0 < sum(step.flip for step in steps) < sum(step.fired for step in steps)


def test_a_shape_is_that_of_the_real_model():
    loaded = open_model("random:qwen2.5-0.5b,layers=1", "bfloat16", "cpu", False)
    config = loaded.model.config
    assert (config.hidden_size, config.num_hidden_layers, loaded.vocab_size) == (896, 1, 151643)
    assert loaded.model.dtype == torch.bfloat16
    assert SHAPES["qwen2.5-0.5b"]["num_hidden_layers"] == 24


@pytest.mark.parametrize("name", ["random:gpt5", "random:qwen2.5-0.5b,layers=x", "random:qwen2.5-0.5b,width=3"])
def test_an_unknown_shape_is_one_clear_line(name):
    with pytest.raises(ConfigError) as caught:
        open_model(name, "auto", "cpu", False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--work", "sleep"], "decode, collect, train"),
        (["--work", "collect"], "pass --llm"),
        (["--trigger-rates", "often"], "comma-separated"),
        (["--trigger-rates", "2"], "0..1"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
