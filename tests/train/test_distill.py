"""Laws of distillation: losses as written down, an SLM that comes nearer to the LLM, a LoRA that anybody can load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from s2t.cli.main import main
from s2t.collect import collect
from s2t.config import (
    CalibrateConfig,
    CollectConfig,
    DecodeConfig,
    DistillConfig,
    EvalConfig,
    FitConfig,
    MeasureConfig,
    TrainConfig,
)
from s2t.decode.label import llm_targets
from s2t.decode.pair import Pair
from s2t.decode.workload import open_task, requests_for
from s2t.errors import ConfigError, OverlapError
from s2t.evaluate import evaluate
from s2t.files import RunFolder, load_run, read_json, read_jsonl
from s2t.measure import calibrate, measure
from s2t.methods.strategies import build_strategy
from s2t.model.adapter import load_adapter, selector_problems
from s2t.model.chat import decode_ids
from s2t.model.load import load_model
from s2t.model.lora import quiet_peft
from s2t.model.merged import base_model, problem_hashes
from s2t.model.tiny import embedded_path
from s2t.tasks.problems import heldout_templates, question_hash
from s2t.train.answers import TrainingAnswer, read_answers
from s2t.train.distill import Distiller, distill
from s2t.train.trainer import train

METHODS = ("sft", "kd", "on-policy-kd")
VOCAB = 40
SETTINGS: dict[str, Any] = {
    "learning_rate": 5e-3,
    "lora_dropout": 0.0,
    "max_steps": 6,
    "limit": 24,
    "max_new_tokens": 100,
}


def settings(folder: Path, method: str, **changes: Any) -> DistillConfig:
    return DistillConfig(**{"method": method, "out": str(folder / method)} | SETTINGS | changes)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """The run folder of a method on the embedded pair, made once, at the first use."""
    folder, made = tmp_path_factory.mktemp("distill"), {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = distill(settings(folder, method))
        return folder / method

    return make


# Losses


def make_answers(num_targets: int, seed: int = 0) -> list[TrainingAnswer]:
    """Four answers of different lengths with the LLM's `num_targets` likeliest tokens of VOCAB."""
    rng = np.random.default_rng(seed)
    made = []
    for place in range(4):
        length = 3 + 2 * place
        probs = rng.dirichlet(np.full(VOCAB, 0.3), length).astype(np.float32)
        ids = np.argsort(-probs, axis=1)[:, :num_targets].astype(np.int32)
        kept = np.take_along_axis(probs, ids.astype(np.int64), 1)
        rest = (1 - kept.sum(1, keepdims=True)).clip(0)
        prompt, tokens = (rng.integers(2, VOCAB, n).astype(np.int32) for n in (2 + place, length))
        made.append(TrainingAnswer(f"task-{place:016x}", prompt, tokens, ids, np.concatenate([kept, rest], 1)))
    return made


def make_distiller(random_model: Any, folder: Path, method: str, num_targets: int = 5, **changes: Any) -> Distiller:
    """A distiller of a random model whose LoRA has left its start at zero."""
    config = DistillConfig(method=method, lora_dropout=0.0, lora_rank=3, batch_answers=4, out=str(folder), **changes)
    loaded = random_model(vocab_size=VOCAB)
    run = RunFolder.open(folder, "distill", config)
    distiller = Distiller(config, make_answers(num_targets), loaded, run)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in distiller.parameters.items():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2)
    return distiller


def naive_loss(distiller: Distiller, method: str, temperature: float) -> torch.Tensor:
    """One forward of the whole model per answer, all logits at once, and the definition spelt out token by token."""
    losses = []
    for answer in distiller.answers:
        ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.token_ids])).long()
        logits = distiller.peft_model(input_ids=ids[None]).logits[0]
        for step, token in enumerate(answer.token_ids.tolist()):
            row = logits[len(answer.prompt_ids) + step - 1]
            if method == "sft":
                losses.append(-row.log_softmax(-1)[token])
                continue
            slm = (row / temperature).softmax(-1)
            kl, listed = torch.zeros(()), torch.zeros(())
            for place, token_id in enumerate(answer.target_ids[step].tolist()):
                llm_prob = float(answer.target_probs[step, place])
                kl = kl + llm_prob * (np.log(llm_prob) - slm[token_id].log())
                listed = listed + slm[token_id]
            rest = float(answer.target_probs[step, -1])
            if rest > 0:
                kl = kl + rest * (np.log(rest) - (1 - listed).log())
            losses.append(temperature**2 * kl)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("logits_at_once", [7 * VOCAB, 2**24])
@pytest.mark.parametrize(("method", "temperature"), [("sft", 1.0), ("kd", 1.0), ("on-policy-kd", 2.0)])
def test_the_loss_and_its_gradients_equal_a_naive_reference(
    method, temperature, logits_at_once, random_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("s2t.train.forward._LOGITS_AT_ONCE", logits_at_once)
    distiller = make_distiller(random_model, tmp_path, method, kd_temperature=temperature)
    distiller.train_mode()
    parameters = list(distiller.parameters.values())
    [loss] = distiller.terms(range(4)).values()
    naive = naive_loss(distiller, method, temperature)
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-5)
    for left, right in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(naive, parameters), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


def test_targets_over_the_whole_vocabulary_give_the_full_kl(random_model, tmp_path):
    distiller = make_distiller(random_model, tmp_path, "kd", num_targets=VOCAB)
    loss = distiller.terms([2])["kl"]
    answer = distiller.answers[2]
    probs = np.zeros((len(answer.token_ids), VOCAB), np.float32)
    np.put_along_axis(probs, answer.target_ids.astype(np.int64), answer.target_probs[:, :-1], 1)
    ids = torch.from_numpy(answer.ids)[None].long()
    logits = distiller.peft_model(input_ids=ids).logits[0, len(answer.prompt_ids) - 1 :]
    expected = F.kl_div(logits.log_softmax(-1), torch.from_numpy(probs), reduction="batchmean")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in distiller.parameters.values())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_targets_are_the_llms_softmax_over_what_the_slm_may_generate(temperature, random_model):
    slm, llm = random_model(seed=0), random_model(seed=1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 900, n).tolist() for n in (4, 9, 2)]
    generated = [rng.integers(2, 900, n).tolist() for n in (7, 1, 5)]
    found = llm_targets(slm, llm, prompts, generated, 20, temperature)
    for prompt, tokens, targets in zip(prompts, generated, found, strict=True):
        with torch.no_grad():
            logits = llm.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
        logits[:, list(slm.reserved.all)] = float("-inf")
        probs = (logits / temperature).softmax(-1)
        top = probs.topk(20).values
        assert targets.ids.shape == (len(tokens), 20)
        torch.testing.assert_close(torch.from_numpy(targets.probs[:, :-1]), top, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(probs.gather(1, torch.from_numpy(targets.ids).long()), top, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(targets.probs.sum(1), 1.0, atol=1e-5)
        assert (targets.probs[:, -1] > 1e-3).all(), "the rest is worth keeping here"


# What is written


def test_the_answers_are_whose_the_method_says(distilled, tiny_slm, tiny_llm):
    for method, name in (("sft", "llm"), ("kd", "llm"), ("on-policy-kd", "greedy")):
        config = DistillConfig(**load_run(distilled(method), "distill")["config"])
        task = open_task(config, config.slm)
        found = {answer.problem_id: answer for answer in read_answers(RunFolder(distilled(method), {}))}
        problems = [p for p in task.problems("train", 40, 0) if p.problem_id in found][:4]
        pair = Pair(tiny_slm, tiny_llm)
        requests = requests_for(pair, task, problems)
        written = pair.write(build_strategy(name, DecodeConfig(), {}), requests, config.max_new_tokens)
        assert [found[p.problem_id].token_ids.tolist() for p in problems] == [s.token_ids for s in written]
        assert [found[p.problem_id].prompt_ids.tolist() for p in problems] == [r.prompt_ids for r in requests]
        shapes = {answer.target_ids.shape[1] for answer in found.values()}
        assert shapes == ({0} if method == "sft" else {config.support_size})


def test_templates_that_are_held_out_are_in_no_answer_and_in_the_record(distilled):
    task = open_task(DistillConfig(), "tiny:slm")
    held = heldout_templates(task.templates(), 0.25)
    hashes = problem_hashes(distilled("kd") / "adapter")
    everything = {question_hash(p.question): p.template for p in task.problems("train", 200, 0)}
    assert len(hashes) == SETTINGS["limit"] and hashes <= everything.keys()
    assert not {everything[item] for item in hashes} & held
    assert read_json(distilled("kd") / "adapter" / "s2t_distill.json")["heldout_templates"] == sorted(held)


def test_only_correct_leaves_wrong_answers_out(tmp_path):
    config = settings(tmp_path, "on-policy-kd", only_correct=True, max_steps=1)
    result = distill(replace(config, limit=24))
    task = open_task(config, config.slm)
    problems = {p.problem_id: p for p in task.problems("train", 200, 0)}
    loaded = load_model("tiny:slm")
    kept = read_answers(RunFolder(tmp_path / "on-policy-kd", {}))
    texts = [(problems[answer.problem_id], decode_ids(loaded.tokenizer, answer.token_ids)) for answer in kept]
    assert all(task.grade(problem, text).is_correct for problem, text in texts)
    assert 0 < result["num_answers"] < result["num_problems"] == 24


def test_an_llm_with_other_tokens_is_learnt_from_by_its_text(tmp_path):
    config = settings(tmp_path, "sft", slm="tiny:slm-numbers", max_steps=1, limit=6)
    distill(config)
    slm, llm = load_model(config.slm), load_model("tiny:llm")
    task = open_task(config, config.slm)
    found = read_answers(RunFolder(tmp_path / "sft", {}))
    problems = {p.problem_id: p for p in task.problems("train", 60, 0)}
    pair = Pair(slm, llm)
    requests = requests_for(pair, task, [problems[answer.problem_id] for answer in found])
    written = pair.write(build_strategy("llm", DecodeConfig(), {}), requests, config.max_new_tokens)
    for answer, request, sequence in zip(found, requests, written, strict=True):
        assert answer.prompt_ids.tolist() == request.prompt_ids
        assert decode_ids(slm.tokenizer, answer.token_ids) == pair.text(sequence, strategy="llm")
        assert (answer.token_ids[-1] in slm.stop_ids) == (sequence.finish_reason == "stop")
        assert answer.token_ids.tolist() != sequence.token_ids


# Training


@pytest.fixture(scope="module")
def worn_slm(tmp_path_factory) -> str:
    """The embedded SLM with noise on its weights: far enough from the LLM that few steps on few problems show."""
    folder = tmp_path_factory.mktemp("worn")
    loaded = load_model("tiny:slm")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (p for p in loaded.model.parameters() if p.ndim == 2):
            weight.add_(torch.randn_like(weight), alpha=0.25 * float(weight.std()))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def held_out_kl(slm: str, llm: Any) -> float:
    """KL(LLM || SLM) in nats per token on the LLM's answers to calibration problems."""
    pair = Pair(load_model(slm), llm)
    task = open_task(DistillConfig(), "tiny:slm")
    requests = requests_for(pair, task, task.problems("calibration", 8, 0))
    written = pair.write(build_strategy("llm", DecodeConfig(), {}), requests, 100)
    labels = pair.label(requests, [sequence.token_ids for sequence in written], support_size=512)
    return float(np.concatenate([label.divergence for label in labels]).mean())


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_slm_comes_nearer_to_the_llm(method, worn_slm, tiny_llm, tmp_path):
    config = settings(tmp_path, method, slm=worn_slm, prompt="plain", limit=24, max_steps=16, max_new_tokens=100)
    distill(config)
    log = [line["loss"] for line in read_jsonl(tmp_path / method / "train_log.jsonl")]
    assert len(log) == 16
    assert np.mean(log[-4:]) < 0.85 * np.mean(log[:4])
    assert held_out_kl(str(tmp_path / method / "adapter"), tiny_llm) < 0.9 * held_out_kl(worn_slm, tiny_llm)


def test_steps_are_those_of_the_epochs_or_as_many_as_asked_for(random_model, tmp_path):
    two = make_distiller(random_model, tmp_path / "two", "sft", epochs=2.5)
    assert (two.steps_per_epoch, two.num_steps) == (1, 3)
    exact = make_distiller(random_model, tmp_path / "exact", "sft", epochs=2.5, max_steps=7)
    exact.fit()
    assert len(exact.log) == exact.num_steps == 7


def test_the_recipe_is_that_of_the_selector():
    shared = set(FitConfig.__dataclass_fields__)
    assert {"lora_rank", "lora_alpha", "lora_dropout", "learning_rate", "max_grad_norm", "warmup_ratio"} <= shared
    assert all(getattr(TrainConfig(), name) == getattr(DistillConfig(), name) for name in shared)


def test_a_finished_run_is_returned_as_it_is(distilled, monkeypatch):
    config = DistillConfig(**load_run(distilled("sft"), "distill")["config"])
    monkeypatch.setattr("s2t.train.distill.load_model", None)
    monkeypatch.setattr("s2t.decode.opening.open_model", None)
    assert distill(config) == read_json(distilled("sft") / "distill.json")


# The adapter


def test_the_adapter_is_an_ordinary_lora(distilled):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = distilled("kd") / "adapter"
    ids = torch.randint(2, 900, (3, 17), generator=torch.Generator().manual_seed(0))
    config = DistillConfig(**load_run(distilled("kd"), "distill")["config"])
    torch.manual_seed(config.seed)
    run = RunFolder.open(distilled("kd").parent / "again", "distill", config)
    distiller = Distiller(config, read_answers(RunFolder(distilled("kd"), {})), load_model("tiny:slm"), run)
    distiller.fit()
    base = AutoModelForCausalLM.from_pretrained(str(embedded_path("tiny:slm")))
    with torch.no_grad():
        plain = base(ids).logits
        trained = distiller.peft_model(input_ids=ids).logits
        with quiet_peft():
            by_peft = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=ids).logits
        by_name = load_model(str(folder)).model(ids).logits
    assert torch.equal(by_peft, trained)
    torch.testing.assert_close(by_name, trained, rtol=1e-4, atol=1e-4)
    assert (trained - plain).abs().max() > 0.1
    assert base_model(str(folder)) == "tiny:slm"
    texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md")]
    assert len(texts) == 3 and not any(str(embedded_path("tiny:slm").parent) in text for text in texts)


def test_selection_on_top_of_a_distilled_slm(distilled, tmp_path):
    slm = str(distilled("sft") / "adapter")
    common: dict[str, Any] = {"slm": slm, "llm": "tiny:llm", "limit": 8, "max_new_tokens": 100}
    at = {name: str(tmp_path / name) for name in ("measure", "calibrate", "collect", "train", "eval")}
    measure(MeasureConfig(**common, out=at["measure"]))
    calibrate(CalibrateConfig(run=at["measure"], out=at["calibrate"], quantile=0.9))
    collect(CollectConfig(**common, out=at["collect"], calibration=at["calibrate"], policy="s2t", seed=1))
    train(TrainConfig(slm=slm, groups=at["collect"], out=at["train"], epochs=1.0, learning_rate=1e-3))
    adapter = f"{at['train']}/adapter"
    by_entropy: dict[str, Any] = {"adapter": adapter, "trigger": "entropy", "threshold": 0.2}
    summary = evaluate(EvalConfig(**common, out=at["eval"], strategies="greedy,s2t-local", **by_entropy))
    assert summary["strategies"]["s2t-local"]["trigger_rate"] > 0
    assert open_task(EvalConfig(slm=slm), slm).prompt_style == "plain", "as the base model is asked"
    assert problem_hashes(slm) < problem_hashes(adapter) == selector_problems(adapter, "tiny:slm")
    assert load_adapter(adapter, load_model(slm)).config.base_model == slm
    assert refused(["eval", "--slm", "tiny:slm", "--adapter", adapter, "--limit", "2", "--out", str(tmp_path / "no")])


def test_problems_it_was_distilled_on_are_refused_as_test_problems(distilled, tmp_path):
    config = EvalConfig(slm=str(distilled("sft") / "adapter"), strategies="greedy", split="train", limit=8)
    with pytest.raises(OverlapError, match="must share no problem"):
        evaluate(replace(config, out=str(tmp_path / "train")))
    assert evaluate(replace(config, split="test", out=str(tmp_path / "test"), max_new_tokens=16))["num_test"] == 8


def test_templates_it_has_not_seen_are_reported_as_unseen(distilled, tmp_path):
    record = read_json(distilled("sft") / "adapter" / "s2t_distill.json")
    config = EvalConfig(slm=str(distilled("sft") / "adapter"), strategies="greedy", limit=16, max_new_tokens=8)
    summary = evaluate(replace(config, heldout_templates=0.9, out=str(tmp_path / "eval")))
    task = open_task(config, "tiny:slm")
    held = [p for p in task.problems("test", 16, 0) if p.template in record["heldout_templates"]]
    assert summary["unseen_templates"]["num_problems"] == len(held) > 0


# A user's mistakes


def refused(words: list[str], capsys: Any = None) -> str:
    """Run a command that must fail with exit code 2; its line."""
    assert main(words) == 2
    if capsys is None:
        return "-"
    captured = capsys.readouterr()
    *progress, line = captured.err.splitlines()
    assert captured.out == "" and line.startswith("s2t: error: ")
    assert all(text.endswith(" done") for text in progress)
    return line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method", "rl"], ["method", "sft, kd, on-policy-kd", "rl"]),
        (["--method", "kd", "--slm", "tiny:slm-numbers"], ["kd", "different tokenizers", "--method sft"]),
        (["--method", "on-policy-kd", "--slm", "tiny:slm-numbers"], ["different tokenizers", "--method sft"]),
        (["--policy", "sample"], ["policy sample", "on-policy-kd"]),
        (["--split", "test"], ["split", "train", "test"]),
        (["--max-steps", "0"], ["max_steps", "at least 1"]),
        (["--kd-temperature", "0", "--method", "kd"], ["kd_temperature", "above 0"]),
        (["--only-correct", "--max-new-tokens", "2"], ["no answer is left", "--only-correct"]),
        (["--slm", "tiny:no-such"], ["tiny:no-such"]),
    ],
)
def test_a_mistake_is_one_line(words, parts, capsys, tmp_path):
    line = refused(["distill", "--limit", "2", "--out", str(tmp_path / "out"), *words], capsys)
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_distilled_slm_is_not_distilled_again(distilled, capsys, tmp_path):
    slm = str(distilled("sft") / "adapter")
    line = refused(["distill", "--slm", slm, "--limit", "2", "--out", str(tmp_path / "out")], capsys)
    assert "--slm tiny:slm" in line and slm in line


def test_without_an_llm_there_is_nothing_to_learn_from(tmp_path):
    with pytest.raises(ConfigError, match="--llm MODEL"):
        distill(DistillConfig(llm=None, limit=2, out=str(tmp_path / "out")))


def test_the_command_prints_what_it_wrote(distilled, capsys):
    config = {k: v for k, v in load_run(distilled("sft"), "distill")["config"].items() if v is not None}
    path = distilled("sft").parent / "config.json"
    path.write_text(json.dumps(config))
    assert main(["distill", "--config", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_json(distilled("sft") / "distill.json")
