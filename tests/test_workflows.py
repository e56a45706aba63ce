"""measure -> calibrate -> collect -> train -> eval on the embedded pair, each step meeting the next through files."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from s2t.collect import collect, read_groups
from s2t.config import CalibrateConfig, CollectConfig, DistillConfig, EvalConfig, MeasureConfig, TrainConfig
from s2t.core.stats import paired_comparison
from s2t.errors import ConfigError, DataError, ModelError, OverlapError
from s2t.evaluate import evaluate
from s2t.files import load_run, read_json, read_jsonl, read_tables
from s2t.measure import calibrate, measure, summarize
from s2t.model.adapter import AdapterConfig
from s2t.summary import _by_template, _heldout
from s2t.tasks.problems import heldout_templates, load_task, question_hash
from s2t.train.distill import distill
from s2t.train.trainer import train

NAMES = ("greedy", "self-consistency", "takeover", "s2t", "s2t-local", "llm")
SHORT = {"max_new_tokens": 40, "batch_size": 16, "slm": "tiny:slm", "llm": "tiny:llm"}
NUM_PROBLEMS = 12


@dataclass
class Chain:
    """Every config of a whole run and what it returned, by command."""

    folder: Path
    configs: dict[str, Any]
    results: dict[str, dict[str, Any]]

    def path(self, command: str) -> Path:
        return self.folder / command


RUN = {"measure": measure, "calibrate": calibrate, "collect": collect, "train": train, "eval": evaluate}


def write_problems(path: Path) -> str:
    """200 questions under four templates; enough for 12 in each split."""
    rng = random.Random(0)
    names = ("Tom", "Ana", "Mia", "Leo")
    lines = []
    for number in range(200):
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        question = f"{names[number % 4]} has {a} apples and buys {b} more. How many apples are there in box {number}?"
        lines.append({"question": question, "answer": str(a + b), "kind": names[number % 4]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"{path},template=kind"


def chain_configs(folder: Path) -> dict[str, Any]:
    common = {**SHORT, "task": write_problems(folder / "problems.jsonl"), "limit": NUM_PROBLEMS}
    at = {name: str(folder / name) for name in (*RUN, "calibrate")}
    calibration = f"{at['calibrate']}/calibration.json"
    return {
        "measure": MeasureConfig(**common, out=at["measure"], quantile=0.8, shard_size=5),
        "calibrate": CalibrateConfig(run=at["measure"], out=at["calibrate"], quantile=0.8),
        "collect": CollectConfig(**common, out=at["collect"], calibration=calibration, shard_size=5),
        "train": TrainConfig(
            groups=at["collect"],
            out=at["train"],
            epochs=2.0,
            lora_rank=2,
            learning_rate=1e-3,
            batch_groups=20,
        ),
        "eval": EvalConfig(
            **common,
            out=at["eval"],
            strategies=",".join(NAMES),
            calibration=calibration,
            adapter=f"{at['train']}/adapter",
            num_samples=3,
            num_traces=9,  # one more than a shard
            shard_size=8,
        ),
    }


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    configs = chain_configs(folder)
    return Chain(folder, configs, {name: RUN[name](configs[name]) for name in RUN})


@pytest.fixture
def no_models(monkeypatch):
    """Any attempt to load a model fails."""

    def refuse(name, *options):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr("s2t.train.trainer.load_model", refuse)
    monkeypatch.setattr("s2t.decode.opening.open_model", refuse)


# Files


@pytest.mark.parametrize(
    ("command", "files"),
    [
        ("measure", ["steps-00000.parquet", "steps-00002.parquet", "measure.json"]),
        ("calibrate", ["calibration.json"]),
        ("collect", ["groups-00000.parquet", "groups-00002.parquet", "collect.json"]),
        ("train", ["adapter/s2t_config.json", "train_log.jsonl", "train.json"]),
        ("eval", ["results.jsonl", "traces.jsonl", "summary.json"]),
    ],
)
def test_a_run_leaves_its_files_and_a_complete_manifest(command, files, chain):
    assert [name for name in files if not (chain.path(command) / name).is_file()] == []
    manifest = load_run(chain.path(command), command)
    assert manifest["config"] == json.loads(json.dumps(chain.configs[command].__dict__))
    assert {"s2t", "python", "torch", "transformers"} <= manifest["versions"].keys()
    assert not [path for path in chain.path(command).rglob("*") if path.name.endswith(".tmp")]


def test_what_a_command_returns_is_what_it_wrote(chain):
    written = {
        "measure": "measure.json",
        "calibrate": "calibration.json",
        "collect": "collect.json",
        "train": "train.json",
    }
    for command, name in (*written.items(), ("eval", "summary.json")):
        assert read_json(chain.path(command) / name) == json.loads(json.dumps(chain.results[command])), command


# Measure and calibrate


def test_hit_rates_grow_with_k(chain):
    found = chain.results["measure"]
    rates = [found["hit_rate"][str(k)] for k in (1, 2, 4, 8, 16)]
    assert rates == sorted(rates)
    assert rates[0] >= 0 and rates[-1] <= 1
    for part in found["hit_rate_by_divergence"]:
        assert list(part["hit_rate"].values()) == sorted(part["hit_rate"].values())
    for k, (low, high) in found["hit_rate_ci95"].items():
        assert low <= found["hit_rate"][k] <= high


@pytest.mark.parametrize("values", [[0.0] * 60 + [0.01 * i for i in range(1, 41)], [0.5, 0.1, 0.3], [0.2] * 7, []])
def test_every_step_past_the_warm_up_is_in_one_bin_of_divergence(values: list[float]):
    warmup = [9.0, 9.0]
    steps = pa.table(
        {
            "problem_id": ["a"] * (len(values) + 2),
            "divergence": np.array(warmup + values, dtype=np.float32),
            "rank": np.zeros(len(values) + 2, dtype=np.int32),
            "is_warmup": [True] * 2 + [False] * len(values),
        }
    )
    bins = summarize(steps, 0.9, 0.25)["hit_rate_by_divergence"]
    assert sum(part["num_steps"] for part in bins) == len(values)
    assert all(part["num_steps"] > 0 for part in bins)
    assert bins == [] or (bins[0]["low"], bins[-1]["high"]) == pytest.approx((min(values), max(values)))


def test_measured_steps_are_one_row_a_token(chain):
    steps = read_tables(sorted(chain.path("measure").glob("steps-*.parquet")))
    assert set(steps.column_names) == {
        "problem_id",
        "step",
        "divergence",
        "entropy",
        "rank",
        "token_id",
        "is_warmup",
    }
    found = chain.results["measure"]
    assert steps.num_rows == found["num_steps"]
    divergence, is_warmup = (steps[name].to_numpy() for name in ("divergence", "is_warmup"))
    assert (divergence >= 0).all() and (steps["rank"].to_numpy() >= 0).all()
    assert found["num_divergence_points"] == ((divergence > found["threshold"]) & ~is_warmup).sum()
    assert is_warmup.sum() == 3 * len(set(steps["problem_id"].to_pylist()))


def test_calibration_is_the_quantile_of_the_measured_run(chain):
    found = chain.results["calibrate"]
    assert found["thresholds"]["divergence"] == chain.results["measure"]["threshold"]
    assert found["trigger_rate"] == pytest.approx(chain.results["measure"]["trigger_rate"])
    assert set(found["thresholds"]) == {"divergence", "entropy", "random"}
    live = 1 - found["trigger_rates"]["random"] / found["thresholds"]["random"]  # the share of warm-up steps
    assert 0 < live < 0.2


def test_calibrate_refuses_a_run_of_another_split(chain, tmp_path, no_models):
    copy = tmp_path / "measure"
    shutil.copytree(chain.path("measure"), copy)
    manifest = read_json(copy / "manifest.json")
    manifest["config"]["split"] = "test"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="measured the test split; thresholds come from the calibration split"):
        calibrate(CalibrateConfig(run=str(copy), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_calibrate_refuses_an_unfinished_run(chain, tmp_path):
    copy = tmp_path / "measure"
    shutil.copytree(chain.path("measure"), copy)
    manifest = read_json(copy / "manifest.json") | {"status": "running"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="unfinished run of s2t measure"):
        calibrate(CalibrateConfig(run=str(copy), out=str(tmp_path / "out")))


# Collect


def test_collected_groups_are_the_divergence_points_past_the_warmup(chain):
    groups = list(read_groups(chain.path("collect")))
    found = chain.results["collect"]
    assert len(groups) == found["num_groups"] > 0
    for group in groups:
        assert group.is_triggered and group.step >= 3
        assert group.divergence > found["threshold"]
        assert len(group.candidate_ids) == len(group.slm_logprobs) == len(group.llm_probs) == 16
        assert list(group.slm_logprobs) == sorted(group.slm_logprobs, reverse=True)
        assert min(group.llm_probs) >= 0 and sum(group.llm_probs) <= 1 + 1e-4
        assert group.provenance.split == "train" and group.provenance.policy == "s2t"


def test_held_out_templates_are_never_collected(chain):
    task = load_task(chain.configs["collect"].task)
    held = heldout_templates(task.templates(), 0.25)
    assert len(held) == 1
    assert chain.results["collect"]["heldout_templates"] == sorted(held)
    rows = read_tables(sorted(chain.path("collect").glob("groups-*.parquet"))).to_pylist()
    assert len({row["problem_id"] for row in rows}) == len(rows) == NUM_PROBLEMS
    assert not {row["template"] for row in rows} & held


def test_collect_without_a_threshold_names_the_next_step(chain, tmp_path):
    with pytest.raises(ConfigError, match="needs a divergence threshold; pass --calibration"):
        collect(replace(chain.configs["collect"], calibration=None, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["sample", "s2t", "takeover"])
def test_other_policies_collect_groups_too(policy, chain, tmp_path):
    config = replace(chain.configs["collect"], policy=policy, out=str(tmp_path / "out"), limit=3, max_new_tokens=16)
    assert collect(config)["num_problems"] == 3
    assert {group.provenance.policy for group in read_groups(tmp_path / "out")} <= {policy}


# Train


def test_the_training_log_has_every_step_with_its_terms(chain):
    log = read_jsonl(chain.path("train") / "train_log.jsonl")
    assert [line["step"] for line in log] == list(range(1, chain.results["train"]["num_steps"] + 1))
    for line in log:
        parts = [line[name] for name in ("listwise", "criticality")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-4)
        assert 0 < line["learning_rate"] <= 1e-3


def test_the_adapter_says_what_it_was_trained_on(chain):
    config = read_json(chain.path("train") / "adapter" / "s2t_config.json")
    assert config["base_model"] == "tiny:slm" and config["llm"] == "tiny:llm"
    assert config["heldout_templates"] == chain.results["collect"]["heldout_templates"]
    hashes = (chain.path("train") / "adapter" / "train_problems.txt").read_text().split()
    rows = read_tables(sorted(chain.path("collect").glob("groups-*.parquet")), ["problem_id"])["problem_id"].to_pylist()
    assert sorted(hashes) == sorted(name[-16:] for name in rows)
    assert set(config["split_hashes"]) == {"train"}


def test_groups_of_another_slm_are_refused(chain, tmp_path):
    config = replace(chain.configs["train"], slm="tiny:llm", out=str(tmp_path / "out"))
    with pytest.raises(ModelError, match="collected with tiny:slm, whose weights are not those of tiny:llm"):
        train(config)


def test_the_same_seed_trains_the_same_adapter(chain, tmp_path):
    train(replace(chain.configs["train"], out=str(tmp_path / "again")))
    for name in ("adapter_model.safetensors", "s2t_selector.safetensors"):
        first, again = (folder / "adapter" / name for folder in (chain.path("train"), tmp_path / "again"))
        assert first.read_bytes() == again.read_bytes()


# Eval


def test_the_summary_has_every_field_of_every_strategy(chain):
    summary = chain.results["eval"]
    assert {
        "task",
        "seed",
        "num_test",
        "pair",
        "strategies",
        "paired",
        "gap_closed",
        "sufficiency",
    } <= summary.keys()
    assert {"slm", "llm", "slm_params", "llm_params"} == summary["pair"].keys()
    assert list(summary["strategies"]) == list(NAMES)
    for name, scores in summary["strategies"].items():
        assert scores["num_problems"] == summary["num_test"] == NUM_PROBLEMS
        low, high = scores["ci95"]
        assert 0 <= low <= scores["accuracy"] <= high <= 1
        assert scores["seconds"] > 0
        for part in ("tokens", "forwards", "processed", "flops"):
            used = [scores[f"{model}_{part}"] > 0 for model in ("slm", "llm")]
            assert used == [name != "llm", name in ("llm", "s2t", "takeover")], (name, part)
        assert 0 <= scores["flip_rate"] <= scores["trigger_rate"] <= 1
        assert ("pass_at_n" in scores) == (name == "self-consistency")
    assert summary["strategies"]["self-consistency"]["num_samples"] == 3
    assert summary["strategies"]["self-consistency"]["pass_at_n"] >= 0


def test_strategies_are_compared_on_the_same_problems(chain):
    paired = chain.results["eval"]["paired"]
    assert {f"s2t-local vs {name}" for name in NAMES if name != "s2t-local"} <= paired.keys()
    strategies = chain.results["eval"]["strategies"]
    for names, found in paired.items():
        left, right = names.split(" vs ")
        assert found["difference"] == pytest.approx(strategies[left]["accuracy"] - strategies[right]["accuracy"])
        assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
        assert 0 < found["p_value"] <= 1


def test_seen_and_unseen_templates_split_the_test_problems(chain):
    summary = chain.results["eval"]
    parts = [summary[name] for name in ("seen_templates", "unseen_templates") if name in summary]
    assert sum(part["num_problems"] for part in parts) == NUM_PROBLEMS
    for part in parts:
        assert {"strategies", "paired"} <= part.keys() and part["num_templates"] >= 1
        for test in part["paired"].values():
            low, high = test["ci95_by_template"]
            assert low - 1e-9 <= test["difference"] <= high + 1e-9


def test_nothing_is_called_unseen_where_no_template_was_held_out(chain):
    config = replace(chain.configs["eval"], slm="tiny:slm")
    for held in ((), ("1", "2")):
        adapter = AdapterConfig("tiny:slm", "", task=config.task, heldout_templates=held)
        assert _heldout(config, load_task(config.task), adapter) == set(held)


def test_a_gain_of_few_templates_is_uncertain_however_many_their_problems():
    def result(template, is_correct):
        return {"template": template, "is_correct": is_correct}

    names = [f"{i % 9}" for i in range(900)]
    rows = {
        "s2t-local": [[result(name, int(name) < 5) for name in names]],
        "greedy": [[result(name, False) for name in names]],
    }
    test = paired_comparison([int(name) < 5 for name in names], [False] * len(names))
    section = _by_template(rows, {"paired": {"s2t-local vs greedy": test}}, 0)
    (low, high), (narrow, wide) = test["ci95_by_template"], test["ci95"]
    assert section["num_templates"] == 9 and high - low > 5 * (wide - narrow)


def test_eval_reads_the_system_prompt_and_ends_answers_at_stop_strings(chain, tmp_path):
    plain = replace(chain.configs["eval"], strategies="greedy", limit=4)
    texts = []
    for name, changes in (("plain", {}), ("stop", {"stop": [" "]}), ("system", {"system": "Leo has 5 fewer apples."})):
        evaluate(replace(plain, out=str(tmp_path / name), **changes))
        texts.append([row["text"] for row in read_jsonl(tmp_path / name / "results.jsonl")])
    whole, stopped, spoken = texts
    assert stopped == [text.split(" ")[0] for text in whole]
    assert spoken != whole


def test_results_are_one_line_a_problem_and_strategy(chain):
    lines = read_jsonl(chain.path("eval") / "results.jsonl")
    assert [line["strategy"] for line in lines] == [name for name in NAMES for _ in range(NUM_PROBLEMS)]
    for name in NAMES:
        found = [line for line in lines if line["strategy"] == name]
        assert len({line["problem_id"] for line in found}) == NUM_PROBLEMS
        accuracy = np.mean([line["is_correct"] for line in found])
        assert accuracy == chain.results["eval"]["strategies"][name]["accuracy"]
        assert {"text", "gold", "extracted", "cost", "finish_reason", "num_triggered", "num_flips"} <= found[0].keys()


def test_traces_show_the_tokens_of_the_results(chain):
    traces = read_jsonl(chain.path("eval") / "traces.jsonl")
    results = {
        (line["problem_id"], line["strategy"]): line for line in read_jsonl(chain.path("eval") / "results.jsonl")
    }
    assert len(traces) == 9 * (len(NAMES) - 1)  # votes have no single trace
    for trace in traces:
        result = results[trace["problem_id"], trace["strategy"]]
        assert len(trace["steps"]) == result["cost"]["generated"]
        assert sum(step.get("fired", False) for step in trace["steps"]) == result["num_triggered"]
        assert sum(step.get("flip", False) for step in trace["steps"]) == result["num_flips"]
        for step in trace["steps"]:
            assert step.get("flip", False) <= (step.get("greedy_id", step["token_id"]) != step["token_id"])
            if step.get("fired"):
                chosen = [c["id"] for c in step["candidates"] if c["selected"]]
                assert chosen == [step["token_id"]] or trace["strategy"] == "takeover"


def test_traces_say_what_the_llm_thinks_of_every_strategys_tokens(chain):
    """Divergence at every step; candidates wherever the LLM would have gone on otherwise, not only where a step fired."""
    unfired = 0
    for trace in read_jsonl(chain.path("eval") / "traces.jsonl"):
        for step in trace["steps"]:
            assert step["divergence"] >= 0
            if trace["strategy"] in ("s2t", "takeover"):
                assert step["value"] == pytest.approx(step["divergence"], rel=1e-2, abs=1e-4)
            for candidate in step.get("candidates", []):
                assert 0 <= candidate["llm_prob"] <= 1
            if step.get("candidates") and not step.get("fired"):
                unfired += 1
                assert step["candidates"][0]["llm_prob"] < 0.5
    assert unfired > 0


def test_an_adapter_trained_on_the_test_problems_is_refused(chain, tmp_path, no_models):
    copy = tmp_path / "adapter"
    shutil.copytree(chain.path("train") / "adapter", copy)
    test = load_task(chain.configs["eval"].task).problems("test", NUM_PROBLEMS, 0)
    (copy / "train_problems.txt").write_text("".join(f"{question_hash(p.question)}\n" for p in test[:5]))
    config = replace(chain.configs["eval"], adapter=str(copy), out=str(tmp_path / "out"))
    with pytest.raises(OverlapError, match=f"5 found in both: .*{test[0].problem_id[:6]}") as caught:
        evaluate(config)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("results-*"))


def test_splits_of_the_chain_share_no_problem(chain):
    task = load_task(chain.configs["eval"].task)
    splits = [{p.problem_id for p in task.problems(name, 200, 0)} for name in ("train", "calibration", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 200


# Again


@pytest.mark.parametrize("command", RUN)
def test_a_finished_run_returns_the_same_without_loading_a_model(command, chain, no_models):
    before = {path: path.read_bytes() for path in chain.path(command).rglob("*.*") if path.name != "manifest.json"}
    again = RUN[command](chain.configs[command])
    assert json.dumps(again) == json.dumps(chain.results[command])
    assert {path: path.read_bytes() for path in before} == before
    assert load_run(chain.path(command), command)["status"] == "complete"


@pytest.mark.parametrize(
    ("command", "change"),
    [
        ("measure", {"limit": 11}),
        ("calibrate", {"quantile": 0.5}),
        ("collect", {"seed": 1}),
        ("train", {"learning_rate": 1.0}),
        ("eval", {"strategies": "greedy"}),
    ],
)
def test_another_config_in_the_same_folder_is_refused(command, change, chain, no_models):
    before = (chain.path(command) / "manifest.json").read_bytes()
    (key,) = change
    with pytest.raises(ConfigError, match=f"was made with {key}=.*, now {key}=.*; choose another --out"):
        RUN[command](replace(chain.configs[command], **change))
    assert (chain.path(command) / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [pytest.param("measure", marks=pytest.mark.slow), "collect", pytest.param("eval", marks=pytest.mark.slow)],
)
def test_several_workers_write_what_one_writes(command, chain, tmp_path):
    RUN[command](replace(chain.configs[command], out=str(tmp_path), workers=2))
    one, two = (sorted(folder.glob("*.parquet")) for folder in (chain.path(command), tmp_path))
    assert [path.name for path in one] == [path.name for path in two]
    assert not one or read_tables(one).equals(read_tables(two))
    for name in ("results.jsonl", "traces.jsonl") if command == "eval" else ():
        assert read_jsonl(tmp_path / name) == read_jsonl(chain.path("eval") / name)


def test_the_number_of_workers_may_change_when_a_run_resumes(chain, no_models):
    assert measure(replace(chain.configs["measure"], workers=3)) == chain.results["measure"]


def test_a_lost_shard_alone_is_made_again(chain, tmp_path):
    """The other shards are kept as they are, and the same groups come back."""
    config = replace(chain.configs["collect"], out=str(tmp_path / "collect"))
    shutil.copytree(chain.path("collect"), tmp_path / "collect")
    manifest = read_json(tmp_path / "collect" / "manifest.json")
    manifest["config"]["out"] = config.out
    (tmp_path / "collect" / "manifest.json").write_text(json.dumps(manifest))
    lost, kept = (tmp_path / "collect" / f"groups-0000{i}.parquet" for i in (1, 0))
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    assert collect(config) == chain.results["collect"]
    assert kept.stat().st_mtime_ns == stamp
    assert list(read_groups(tmp_path / "collect")) == list(read_groups(chain.path("collect")))


def test_a_paper_adapter_that_earned_no_weight_writes_what_the_base_writes(chain, tmp_path, capsys):
    """Under scope `always` the LoRA is on every token; one that a handful of groups cannot speak for must not change the LM."""
    config = TrainConfig(
        groups=str(chain.path("collect")),
        out=str(tmp_path / "train"),
        readout="bins",
        adapter_scope="always",
        max_steps=3,
        learning_rate=0.1,
        lora_rank=2,
        batch_groups=20,
        heldout_problems=0.5,
    )
    assert train(config)["held_out"]["adapter_weight"] == 0
    assert "It was given weight 0" in capsys.readouterr().err
    found = evaluate(
        replace(
            chain.configs["eval"],
            out=str(tmp_path / "eval"),
            adapter=f"{config.out}/adapter",
            strategies="greedy,s2t-local",
            threshold=0.0,
        )
    )
    assert found["strategies"]["s2t-local"]["trigger_rate"] == pytest.approx(1, abs=0.2)
    texts: dict[str, list[str]] = {"greedy": [], "s2t-local": []}
    for row in read_jsonl(tmp_path / "eval" / "results.jsonl"):
        texts[row["strategy"]].append(row["text"])
    assert texts["greedy"] == texts["s2t-local"]


RESUMED = {
    "measure": (measure, MeasureConfig, {}),
    "collect": (collect, CollectConfig, {"threshold": 0.05}),
    "eval": (evaluate, EvalConfig, {"strategies": "greedy"}),
    "distill": (distill, DistillConfig, {"method": "sft", "max_steps": 1}),
}


@pytest.mark.parametrize("command", RESUMED)
def test_shards_of_problems_that_have_changed_since_are_refused(command, tmp_path, monkeypatch):
    run, kind, own = RESUMED[command]
    task = write_problems(tmp_path / "problems.jsonl").partition(",")[0]
    lines = Path(task).read_text().splitlines(keepends=True)
    out = tmp_path / "run"
    config = kind(**SHORT | {"max_new_tokens": 8}, task=task, split="train", shard_size=4, out=str(out), **own)

    def resume(count):
        """Go on as after a kill, with so many lines in the task's file."""
        Path(task).write_text("".join(lines[:count]))
        if (out / "manifest.json").exists():
            manifest = read_json(out / "manifest.json")
            (out / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
        return run(config)

    resume(9)
    assert resume(9)["num_test" if command == "eval" else "num_problems"] <= 9
    with monkeypatch.context() as patch:
        patch.setattr("s2t.workers.Workers.map", lambda *_: pytest.fail("a shard was worked"))
        for count in (4, 20):
            with pytest.raises(
                DataError, match=r"shard .*0000\d\.\w+ holds other problems .*; remove the folder or use"
            ):
                resume(count)
