"""`s2t eval` with triggers of their own, several seeds and many samples."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import s2t
from s2t.config import EvalConfig
from s2t.decode.pair import Pair
from s2t.errors import ConfigError
from s2t.evaluate import _num_traces, evaluate
from s2t.methods.sample import choose_sample
from s2t.model.adapter import AdapterConfig, SelectorAdapter, adapter_config
from s2t.model.load import load_model
from s2t.records import Candidates, Step
from s2t.summary import _heldout
from s2t.traces import TokenTexts, trace_steps

NAMES = "greedy,sample,self-consistency,self-certainty,s2t@divergence,s2t@entropy,takeover@random"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    calibration = folder / "calibration.json"
    calibration.write_text(json.dumps({"thresholds": {"divergence": 0.3, "entropy": 0.05, "random": 0.1}}))
    config = EvalConfig(
        slm="tiny:slm",
        llm="tiny:llm",
        strategies=NAMES,
        calibration=str(calibration),
        out=str(folder / "run"),
        limit=12,
        num_seeds=2,
        num_samples=4,
        max_new_tokens=96,
        num_traces=1,
    )
    return config, evaluate(config)


def lines(config):
    return [json.loads(line) for line in Path(config.out, "results.jsonl").read_text().splitlines()]


def test_what_draws_at_random_has_every_seed_and_nothing_else_has_two(run):
    config, summary = run
    seeds = {name: scores["num_seeds"] for name, scores in summary["strategies"].items()}
    random = {"sample", "self-consistency", "self-certainty", "takeover@random"}
    assert seeds == {name: 2 if name in random else 1 for name in NAMES.split(",")}
    results = lines(config)
    for name, count in seeds.items():
        own = [(r["problem_id"], r["seed"]) for r in results if r["strategy"] == name]
        assert len(own) == len(set(own)) == 12 * count
        scores = summary["strategies"][name]
        assert scores["accuracy"] == pytest.approx(np.mean(scores["accuracy_by_seed"]))
        assert scores["num_problems"] == 12
    texts = {s: [r["text"] for r in results if r["strategy"] == "sample" and r["seed"] == s] for s in (0, 1)}
    assert texts[0] != texts[1]


def test_a_trigger_of_its_own_is_used(run):
    _, summary = run
    rates = {name: scores["trigger_rate"] for name, scores in summary["strategies"].items()}
    assert 0.02 < rates["takeover@random"] < 0.25
    results = lines(run[0])
    fired = {name: [r["num_triggered"] for r in results if r["strategy"] == name] for name in rates}
    assert fired["s2t@divergence"] != fired["s2t@entropy"]
    assert rates["s2t@divergence"] > 0
    assert rates["s2t@entropy"] > 0
    assert rates["greedy"] == 0


def test_costs_are_those_of_one_seed(run):
    _, summary = run
    scores = summary["strategies"]
    assert scores["sample"]["slm_tokens"] < 2 * scores["greedy"]["slm_tokens"]
    assert scores["self-consistency"]["slm_tokens"] > 2.5 * scores["sample"]["slm_tokens"]


def test_the_curves_over_the_number_of_samples_end_at_what_was_run(run):
    config, summary = run
    for name in ("self-consistency", "self-certainty"):
        scores = summary["strategies"][name]
        curve = scores["by_num_samples"]
        assert list(curve) == ["1", "2", "3", "4"]
        assert curve["4"]["accuracy"] == pytest.approx(scores["accuracy"])
        assert curve["4"]["pass_at"] == pytest.approx(scores["pass_at_n"])
        for value, interval in (("accuracy", "ci95"), ("pass_at", "pass_at_ci95")):
            assert all(low <= one[value] <= high for one in curve.values() for low, high in [one[interval]])
        passes = [curve[n]["pass_at"] for n in curve]
        assert passes == sorted(passes)
        share = np.mean([r["num_correct_samples"] / 4 for r in lines(config) if r["strategy"] == name])
        assert passes[0] == pytest.approx(share)


def test_both_ways_to_choose_see_the_same_samples(run):
    config, _ = run
    votes = {
        name: [r["samples"] for r in lines(config) if r["strategy"] == name]
        for name in ("self-consistency", "self-certainty")
    }
    for voted, rated in zip(*votes.values(), strict=True):
        assert [s["answer"] for s in voted] == [s["answer"] for s in rated]
        assert all(s["certainty"] is None for s in voted)
        assert all(s["certainty"] > 0 for s in rated)


def test_samples_judged_twice_are_those_of_a_vote_alone(run, tmp_path):
    config, _ = run
    alone = replace(config, strategies="self-consistency", out=str(tmp_path / "alone"), limit=6)
    evaluate(alone)
    both = {(r["problem_id"], r["seed"]): r for r in lines(config) if r["strategy"] == "self-consistency"}
    for result in lines(alone):
        same = both[result["problem_id"], result["seed"]]
        assert {k: v for k, v in result.items() if k != "cost"} == {k: v for k, v in same.items() if k != "cost"}


def test_one_sample_is_a_vote_too(run, tmp_path):
    config, _ = run
    alone = replace(
        config, strategies="self-consistency", num_samples=1, num_seeds=1, out=str(tmp_path / "one"), limit=3
    )
    scores = evaluate(alone)["strategies"]["self-consistency"]
    assert scores["pass_at_n"] == scores["accuracy"] == scores["by_num_samples"]["1"]["accuracy"]


def test_many_comparisons_are_adjusted(run):
    _, summary = run
    tests = summary["paired"].values()
    assert len(tests) == 6
    assert all(test["p_value"] <= test["p_holm"] <= 1 for test in tests)
    assert all(0 < test["detectable"] <= 1 for test in tests)


def test_a_rerun_reads_what_is_there(run):
    config, summary = run
    assert evaluate(config) == summary


def test_the_surest_sample_or_the_majority():
    answers, certainties = ["3", "4", "4", None], [1.0, 2.0, 0.5, 9.0]
    assert choose_sample("self-consistency", answers, certainties) == 1
    assert choose_sample("self-certainty", answers, certainties) == 3


def test_the_api_gives_the_surest_sample():
    answer = s2t.load("tiny:slm").generate("What is 3 + 4?", "self-certainty", num_samples=3, max_new_tokens=24)
    assert len(answer.samples) == 3
    assert answer.text in [sample.text for sample in answer.samples]


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ("greedy@entropy", "only takeover, s2t, s2t-local, local-branch take a trigger"),
        ("s2t@weather", "trigger of s2t must be one of"),
        ("s2t@entropy,s2t@entropy", "more than once"),
    ],
)
def test_what_is_no_variant_is_refused(strategies, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(strategies=strategies)


def test_a_trigger_that_does_not_fit_is_refused_before_a_model_is_loaded(tmp_path):
    settings = {"llm": "nowhere", "slm": "nowhere", "out": str(tmp_path / "x")}
    with pytest.raises(
        ConfigError, match="strategy contrastive has a trigger of its own; leave --trigger out, got 'entropy'"
    ):
        evaluate(EvalConfig(strategies="contrastive", trigger="entropy", **settings))
    with pytest.raises(ConfigError, match="strategy s2t@criticality needs --adapter"):
        evaluate(EvalConfig(strategies="s2t@criticality", **settings | {"slm": "tiny:slm"}))


def test_what_a_strategy_needs_is_said_before_its_threshold(tmp_path):
    with pytest.raises(ConfigError, match="s2t-local needs --adapter"):
        evaluate(EvalConfig(strategies="greedy,s2t-local", out=str(tmp_path / "x")))
    with pytest.raises(ConfigError, match="s2t needs the LLM"):
        evaluate(EvalConfig(strategies="greedy,s2t@entropy", out=str(tmp_path / "x")))


TOKENIZER = load_model("tiny:slm").tokenizer


def in_order(ids):
    texts, pending, found = TokenTexts(TOKENIZER), b"", []
    for token_id in ids:
        found.append(texts.text(token_id, pending))
        pending = texts.pending(token_id, pending)
    return found


def test_a_character_of_several_tokens_stands_at_its_last_one_and_bytes_before_it():
    ids = TOKENIZER.encode("7東 €", add_special_tokens=False)
    shown = in_order(ids)
    assert [part for part in shown if "\\x" not in part and part.strip()] == ["7", "東", " €"]
    assert shown[1:4] == ["\\xe6", "\\x9d", "東"]
    assert "\ufffd" not in "".join(shown)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",), exclude_characters="\\"), max_size=12))
def test_texts_of_tokens_in_order_are_the_text_and_bytes_of_parts(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert "".join(part for part in in_order(ids) if not part.startswith("\\x")) == text


def test_bytes_that_are_no_character_stay_bytes():
    ids = TOKENIZER.encode("東", add_special_tokens=False)
    assert in_order([ids[1], ids[0], ids[0]]) == ["\\x9d", "\\xe6", "\\xe6"]
    assert in_order([ids[0], *TOKENIZER.encode("7東", add_special_tokens=False)]) == [
        "\\xe6",
        *("7", "\\xe6", "\\x9d", "東"),
    ]


def test_candidates_of_a_trace_finish_the_character_that_was_begun():
    first, second, third = TOKENIZER.encode("東", add_special_tokens=False)
    choice = Candidates(ids=(third, second), logprobs=(-0.1, -2.0))
    steps = [Step(0, i, token, token) for i, token in enumerate((first, second))]
    steps.append(Step(0, 2, third, second, fired=True, candidates=choice, selected_index=0))
    traced = trace_steps(TokenTexts(TOKENIZER), steps)
    assert [step["text"] for step in traced] == ["\\xe6", "\\x9d", "東"]
    assert [candidate["text"] for candidate in traced[2]["candidates"]] == ["東", "杝"]
    assert traced[2]["greedy_text"] == "杝"


@pytest.mark.parametrize(
    ("task", "held"), [("one.jsonl", {"a", "b"}), ("two.jsonl", {"c"}), ("none.jsonl", set()), ("other.jsonl", {"a"})]
)
def test_an_adapter_of_several_tasks_has_unseen_templates_of_its_own_in_each(task, held):
    by_task = {"one.jsonl": ("a", "b"), "two.jsonl": ("c",), "none.jsonl": ()}
    saved = json.loads(
        json.dumps(asdict(AdapterConfig("base", "0", heldout_templates=("a",), heldout_by_task=by_task)))
    )
    named: Any = SimpleNamespace(templates=lambda: ("a", "b", "c"))
    assert _heldout(EvalConfig(task=task), named, adapter_config(saved)) == held


ADAPTED = {
    "of this task": ("rg:gsm_symbolic", ("1", "2"), {"1", "2"}),
    "of this task under other options": ("rg:gsm_symbolic,max_number=7", ("1",), {"1"}),
    "of two tasks": ("rg:chain_sum;rg:gsm_symbolic,max_number=7", ("2",), {"2"}),
    "of another task": ("rg:chain_sum", ("1", "2"), set()),
    "of another file": ("data/one.jsonl,answer=x", ("1", "2"), set()),
    "with none held out": ("rg:gsm_symbolic", (), set()),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_held_out_templates_of_one_task_say_nothing_about_another(kind):
    trained, templates, held = ADAPTED[kind]
    adapter = AdapterConfig("base", "0", task=trained, heldout_templates=templates)
    named: Any = SimpleNamespace(templates=lambda: ("1", "2", "3"))
    bare: Any = SimpleNamespace(templates=lambda: ())
    config = EvalConfig(task="rg:gsm_symbolic,max_number=100")
    assert _heldout(config, named, adapter) == held
    assert _heldout(config, bare, adapter) == set()


def test_an_adapter_with_held_out_templates_is_evaluated_on_a_task_without(tmp_path):
    loaded = load_model("tiny:slm")
    settings = {"task": "rg:gsm_symbolic,max_number=100", "heldout_templates": ("1", "2")}
    config = AdapterConfig("tiny:slm", loaded.fingerprint, lora_rank=2, thresholds={"criticality": 0.5}, **settings)
    SelectorAdapter(loaded, config).save(tmp_path / "adapter")
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "kind": "ab"[n % 2]} for n in range(90)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in ("sums.jsonl", "sums.jsonl,template=kind"):
        config = EvalConfig(
            task=str(tmp_path / task),
            strategies="greedy,s2t-local",
            adapter=str(tmp_path / "adapter"),
            out=str(tmp_path / f"run-{len(task)}"),
            max_new_tokens=8,
            split="train",
            limit=12,
        )
        summary = evaluate(config)
        assert not {"seen_templates", "unseen_templates"} & summary.keys()
        assert evaluate(config) == summary


@pytest.mark.parametrize(
    ("strategies", "asked", "num_problems", "expected"),
    [
        ("greedy,s2t", None, 64, 5),
        ("greedy,s2t@entropy", None, 1200, 12),
        ("llm", None, 10_000, 32),
        ("greedy,s2t-local", None, 500, 32),
        ("greedy,s2t", 1000, 500, 1000),
        ("greedy,s2t", 0, 500, 0),
    ],
)
def test_few_answers_are_read_again_unless_more_are_asked_for(strategies, asked, num_problems, expected):
    assert _num_traces(EvalConfig(strategies=strategies, num_traces=asked), num_problems) == expected


def test_what_the_report_shows_is_a_small_part_of_what_is_read(tmp_path, monkeypatch):
    read = []
    label = Pair.label

    def counted(self, requests, *args, **kwargs):
        read.extend(requests)
        return label(self, requests, *args, **kwargs)

    monkeypatch.setattr(Pair, "label", counted)
    common = {"llm": "tiny:llm", "strategies": "greedy,llm", "max_new_tokens": 8, "limit": 250, "shard_size": 100}
    evaluate(EvalConfig(out=str(tmp_path / "run"), **common))
    assert len(read) == 2 * 5
    assert len((tmp_path / "run" / "traces.jsonl").read_text().splitlines()) == 2 * 5
